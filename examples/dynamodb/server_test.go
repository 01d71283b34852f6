package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/stretchr/testify/require"
)

// asProgram makes the test binary run main instead of the tests, so that the
// tests drive the real program without building it again.
const asProgram = "DYNAMODB_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// dynalite is an implementation of DynamoDB's API that all tests share. It keeps
// its tables in memory.
var dynalite struct {
	start sync.Once
	stdin io.Closer // keeps it running
	url   string
}

const install = "npm ci --prefix testdata/dynalite --ignore-scripts"

// endpoint returns the URL of dynalite. Where it is not installed the test is
// skipped, or fails if DYNAMODB_REQUIRED is 1.
func endpoint(t *testing.T) string {
	t.Helper()
	dynalite.start.Do(startDynalite)
	if dynalite.url == "" && os.Getenv("DYNAMODB_REQUIRED") == "1" {
		t.Fatal("DYNAMODB_REQUIRED=1, but dynalite does not run. Node 18 or newer installs it: " + install)
	}
	if dynalite.url == "" {
		t.Skip("dynalite does not run. Node 18 or newer installs it: " + install)
	}
	return dynalite.url
}

func startDynalite() {
	cmd := exec.CommandContext(context.Background(), "node", "testdata/dynalite/serve.js")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return
	}
	// dynalite ends with its standard input, even if the tests are killed.
	if dynalite.stdin, err = cmd.StdinPipe(); err != nil || cmd.Start() != nil {
		return
	}
	line, _ := bufio.NewReader(stdout).ReadString('\n')
	dynalite.url = strings.TrimSpace(line)
}

// connect returns a client of a server at url.
func connect(url string, more ...func(*dynamodb.Options)) *dynamodb.Client {
	return NewClient(aws.Config{
		Region: "us-east-1", BaseEndpoint: &url,
		Credentials: credentials.NewStaticCredentialsProvider("local", "local", ""),
	}, more...)
}

// newTable makes a table of the test's own and returns its name.
func newTable(t *testing.T) string {
	t.Helper()
	table := "t" + rand.Text()
	require.NoError(t, CreateTable(t.Context(), connect(endpoint(t)), table))
	return table
}

// A recorder sees the calls of a client, and can lose the reply of one.
type recorder struct {
	next dynamodb.HTTPClient

	mu    sync.Mutex // guards what follows
	calls []string   // PutItem, consistent GetItem
	lose  string     // whose reply is lost, if not empty
	skip  int        // how many of these calls get their reply first
	lost  int
}

// Do sends a call and loses the reply when it is the turn of that.
func (r *recorder) Do(req *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, err
	}
	req.Body = io.NopCloser(bytes.NewReader(body))
	resp, err := r.next.Do(req)
	r.mu.Lock()
	defer r.mu.Unlock()
	_, name, _ := strings.Cut(req.Header.Get("X-Amz-Target"), ".")
	if bytes.Contains(body, []byte(`"ConsistentRead":true`)) {
		name = "consistent " + name
	}
	r.calls = append(r.calls, name)
	if err != nil || name != r.lose {
		return resp, err
	}
	if r.skip > 0 {
		r.skip--
		return resp, nil
	}
	r.lose, r.lost = "", r.lost+1
	_ = resp.Body.Close()
	return nil, &url.Error{Op: "Post", URL: req.URL.String(), Err: io.ErrUnexpectedEOF}
}

func (r *recorder) loseReply(call string) { r.loseReplyAfter(call, 0) }

func (r *recorder) loseReplyAfter(call string, skip int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lose, r.skip = call, skip
}

// take returns the calls since the last take.
func (r *recorder) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	calls := r.calls
	r.calls = nil
	return calls
}

// recorded makes the client of o use a recorder.
func recorded(r *recorder) func(*dynamodb.Options) {
	return func(o *dynamodb.Options) {
		r.next = o.HTTPClient
		o.HTTPClient = r
	}
}

// A likeAWS is a proxy that sends the item along with a refused write, as
// DynamoDB does and dynalite does not. It reads the item after the refusal, so
// the item may be a newer one than that of the condition.
type likeAWS struct {
	*httptest.Server
	sent atomic.Int64 // refusals with an item
}

func newLikeAWS(t *testing.T) *likeAWS {
	t.Helper()
	backend, err := url.Parse(endpoint(t))
	require.NoError(t, err)
	p := new(likeAWS)
	proxy := httputil.NewSingleHostReverseProxy(backend)
	proxy.ErrorLog = log.New(io.Discard, "", 0) // of clients that hang up
	proxy.ModifyResponse = p.addItem
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		proxy.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), bodyKey{}, body)))
	}))
	t.Cleanup(p.Close)
	return p
}

type bodyKey struct{}

func (p *likeAWS) addItem(resp *http.Response) error {
	if resp.StatusCode != http.StatusBadRequest {
		return nil
	}
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	defer func() {
		resp.Header.Del("X-Amz-Crc32")
		resp.Header.Del("Content-Length")
		resp.ContentLength = int64(len(answer))
		resp.Body = io.NopCloser(bytes.NewReader(answer))
	}()
	if !bytes.Contains(answer, []byte("ConditionalCheckFailedException")) {
		return nil
	}
	var put struct {
		TableName                           string
		Item                                map[string]json.RawMessage
		ReturnValuesOnConditionCheckFailure string
	}
	body, _ := resp.Request.Context().Value(bodyKey{}).([]byte)
	if err := json.Unmarshal(body, &put); err != nil || put.ReturnValuesOnConditionCheckFailure != "ALL_OLD" {
		return err
	}
	found, err := p.get(resp.Request, put.TableName, put.Item[attrID])
	if err != nil || len(found) == 0 {
		return err
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(answer, &members); err != nil {
		return err
	}
	members["Item"] = found
	p.sent.Add(1)
	answer, err = json.Marshal(members)
	return err
}

// get returns the item as JSON, signed with the headers of the write: dynalite
// wants them, and does not check the signature.
func (p *likeAWS) get(write *http.Request, table string, id json.RawMessage) (json.RawMessage, error) {
	body, err := json.Marshal(map[string]any{
		"TableName": table, "Key": map[string]json.RawMessage{attrID: id}, "ConsistentRead": true,
	})
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(write.Context(), http.MethodPost, write.URL.String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = write.Header.Clone()
	req.Header.Del("Accept-Encoding")
	req.Header.Set("X-Amz-Target", "DynamoDB_20120810.GetItem")
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var out struct{ Item json.RawMessage }
	err = json.NewDecoder(resp.Body).Decode(&out)
	return out.Item, err
}

// patience is how long the tests wait for what must happen.
const patience = 120 * time.Second
