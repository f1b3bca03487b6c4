// A server by the Go SDK, both eras: `server stdio` or `server PORT`.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"log"
	"net/http"
	"os"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

type none struct{}
type addends struct {
	A float64 `json:"a"`
	B float64 `json:"b"`
}
type sum struct {
	Sum float64 `json:"sum"`
}
type message struct {
	Message string `json:"message"`
}

type request = mcp.CallToolRequest
type result = mcp.CallToolResult

func text(t string) *result {
	return &result{Content: []mcp.Content{&mcp.TextContent{Text: t}}}
}

func main() {
	s := mcp.NewServer(&mcp.Implementation{Name: "go", Version: "1"}, nil)
	mcp.AddTool(s, &mcp.Tool{Name: "add"}, func(_ context.Context, _ *request, in addends) (*result, sum, error) {
		return nil, sum{in.A + in.B}, nil
	})
	mcp.AddTool(s, &mcp.Tool{Name: "echo"}, func(_ context.Context, _ *request, in message) (*result, any, error) {
		return text(in.Message), nil, nil
	})
	mcp.AddTool(s, &mcp.Tool{Name: "fail"}, func(context.Context, *request, none) (*result, any, error) {
		return nil, nil, errors.New("broken on purpose")
	})
	mcp.AddTool(s, &mcp.Tool{Name: "steps"}, func(ctx context.Context, r *request, _ none) (*result, any, error) {
		for i := 1.0; i <= 3; i++ {
			token := r.Params.GetProgressToken()
			r.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ProgressToken: token, Progress: i, Total: 3})
		}
		return text("stepped"), nil, nil
	})
	mcp.AddTool(s, &mcp.Tool{Name: "ask"}, func(_ context.Context, r *request, _ none) (*result, any, error) {
		if answer, ok := r.Params.InputResponses["who"].(*mcp.ElicitResult); ok {
			return text("Hello, " + answer.Content["name"].(string)), nil, nil
		}
		schema := json.RawMessage(`{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}`)
		who := &mcp.ElicitParams{Message: "Who?", RequestedSchema: schema}
		return &result{InputRequests: mcp.InputRequestMap{"who": who}}, nil, nil
	})
	s.AddResource(&mcp.Resource{URI: "peer://note", Name: "note"},
		func(context.Context, *mcp.ReadResourceRequest) (*mcp.ReadResourceResult, error) {
			return &mcp.ReadResourceResult{Contents: []*mcp.ResourceContents{{URI: "peer://note", Text: "a note"}}}, nil
		})
	s.AddPrompt(&mcp.Prompt{Name: "greet", Arguments: []*mcp.PromptArgument{{Name: "name", Required: true}}},
		func(_ context.Context, r *mcp.GetPromptRequest) (*mcp.GetPromptResult, error) {
			say := &mcp.TextContent{Text: "Say hello to " + r.Params.Arguments["name"]}
			return &mcp.GetPromptResult{Messages: []*mcp.PromptMessage{{Role: "user", Content: say}}}, nil
		})
	if os.Args[1] == "stdio" {
		log.Fatal(s.Run(context.Background(), &mcp.StdioTransport{}))
	}
	// A handler speaks the modern era only without sessions, and the legacy era asks only with them.
	get := func(*http.Request) *mcp.Server { return s }
	legacy := mcp.NewStreamableHTTPHandler(get, nil)
	modern := mcp.NewStreamableHTTPHandler(get, &mcp.StreamableHTTPOptions{Stateless: true})
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Mcp-Protocol-Version") == "2026-07-28" {
			modern.ServeHTTP(w, r)
		} else {
			legacy.ServeHTTP(w, r)
		}
	})))
}
