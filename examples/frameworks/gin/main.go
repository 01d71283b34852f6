// Command gin serves a gin route that is safe to retry.
package main

import (
	"log"
	"net/http"

	"github.com/gin-gonic/gin"
	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/server"
)

func main() {
	background := new(idempotency.Background)
	once := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Background: background})
	if err := server.Run("127.0.0.1:8080", newHandler(newEngine(), once), background); err != nil {
		log.Fatal(err)
	}
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
