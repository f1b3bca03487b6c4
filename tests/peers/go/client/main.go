// A client by the Go SDK: does what the plan in its argument says, prints what it saw as one JSON object.
package main

import (
	"context"
	"encoding/json"
	"log"
	"net/http"
	"os"
	"os/exec"
	"sync/atomic"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

type object map[string]any

// bearer sets the plan's headers.
type bearer map[string]string

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	for name, value := range b {
		r.Header.Set(name, value)
	}
	return http.DefaultTransport.RoundTrip(r)
}

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

func text(content ...mcp.Content) (all string) {
	for _, c := range content {
		if t, ok := c.(*mcp.TextContent); ok {
			all += t.Text
		}
	}
	return all
}

func main() {
	var plan struct {
		Era, URL string
		Headers  bearer
		Command  []string
		Lists    bool
		Calls    [][2]any
	}
	if err := json.Unmarshal([]byte(os.Args[1]), &plan); err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	var progress atomic.Int32
	asked, calls, tools := []string{}, []object{}, []string{}
	client := mcp.NewClient(&mcp.Implementation{Name: "go", Version: "1"}, &mcp.ClientOptions{
		ElicitationHandler: func(_ context.Context, r *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
			asked = append(asked, r.Params.Message)
			return &mcp.ElicitResult{Action: "accept", Content: object{"name": "Ann"}}, nil
		},
		ProgressNotificationHandler: func(context.Context, *mcp.ProgressNotificationClientRequest) { progress.Add(1) },
	})
	var transport mcp.Transport
	if plan.URL != "" {
		transport = &mcp.StreamableClientTransport{Endpoint: plan.URL, HTTPClient: &http.Client{Transport: plan.Headers}}
	} else {
		command := exec.Command(plan.Command[0], plan.Command[1:]...)
		command.Stderr = os.Stderr
		transport = &mcp.CommandTransport{Command: command}
	}
	options := &mcp.ClientSessionOptions{}
	if plan.Era == "legacy" {
		options.ProtocolVersion = "2025-11-25"
	}
	s := must(client.Connect(ctx, transport, options))
	seen := object{"version": s.InitializeResult().ProtocolVersion}
	for _, t := range must(s.ListTools(ctx, nil)).Tools {
		tools = append(tools, t.Name)
	}
	if plan.Lists {
		uris, names := []string{}, []string{}
		for _, r := range must(s.ListResources(ctx, nil)).Resources {
			uris = append(uris, r.URI)
		}
		for _, p := range must(s.ListPrompts(ctx, nil)).Prompts {
			names = append(names, p.Name)
		}
		seen["resources"], seen["prompts"] = uris, names
		seen["note"] = must(s.ReadResource(ctx, &mcp.ReadResourceParams{URI: "peer://note"})).Contents[0].Text
		greet := must(s.GetPrompt(ctx, &mcp.GetPromptParams{Name: "greet", Arguments: map[string]string{"name": "Ann"}}))
		seen["greet"] = text(greet.Messages[0].Content)
	}
	for i, c := range plan.Calls {
		params := &mcp.CallToolParams{Name: c[0].(string), Arguments: c[1]}
		params.SetProgressToken(i)
		r, err := s.CallTool(ctx, params)
		if err != nil {
			calls = append(calls, object{"error": err.Error()})
		} else {
			calls = append(calls, object{"text": text(r.Content...), "structured": r.StructuredContent, "isError": r.IsError})
		}
	}
	s.Close()
	seen["tools"], seen["calls"], seen["asked"], seen["progress"] = tools, calls, asked, progress.Load()
	json.NewEncoder(os.Stdout).Encode(seen)
}
