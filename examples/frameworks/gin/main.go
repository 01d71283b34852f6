// Command gin serves a gin route that is safe to retry.
package main

import (
	"log"
	"net/http"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/go-idempotency/idempotency"
)

func main() {
	once := idempotency.Middleware(idempotency.NewMemoryStore(), nil)
	server := &http.Server{Addr: "127.0.0.1:8080", Handler: newHandler(newEngine(), once), ReadHeaderTimeout: 5 * time.Second}
	log.Fatal(server.ListenAndServe())
}

// newHandler puts the middleware around the engine, for the paths that need it.
func newHandler(engine *gin.Engine, once func(http.Handler) http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST /charge", once(engine))
	mux.Handle("/", engine)
	return mux
}

// newEngine leaves out gin.Recovery. Inside of the middleware it would turn a
// panic into a 500, which frees the key. The server of net/http recovers.
func newEngine() *gin.Engine {
	engine := gin.New()
	engine.POST("/charge", charge)
	return engine
}

func charge(c *gin.Context) {
	if c.Query("card") == "declined" {
		c.AbortWithStatusJSON(http.StatusPaymentRequired, gin.H{"error": "the card was declined"})
		return
	}
	c.Header("Location", "/charges/1")
	c.JSON(http.StatusCreated, gin.H{"charge": "1"})
}
