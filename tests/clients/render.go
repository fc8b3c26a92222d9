// Renders conversations with a Modelfile's TEMPLATE as Ollama does: its messages are collated, then Go's text/template runs.
// Source: ollama `template/template.go` (`collate`, `Execute`), commit fb30760, 2026-08-21.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type Case struct {
	Template      string      `json:"template"`
	System        string      `json:"system"`
	Conversations [][]Message `json:"conversations"`
}

func collate(messages []Message) (string, []Message) {
	var system []string
	var collated []Message
	for _, message := range messages {
		if message.Role == "system" {
			system = append(system, message.Content)
		}
		last := len(collated) - 1
		if last >= 0 && collated[last].Role == message.Role {
			collated[last].Content += "\n\n" + message.Content
		} else {
			collated = append(collated, message)
		}
	}
	return strings.Join(system, "\n\n"), collated
}

func render(parsed *template.Template, defaultSystem string, messages []Message) string {
	if defaultSystem != "" && messages[0].Role != "system" {
		messages = append([]Message{{Role: "system", Content: defaultSystem}}, messages...)
	}
	system, collated := collate(messages)
	var text strings.Builder
	values := map[string]any{"System": system, "Messages": collated, "Response": ""}
	if err := parsed.Execute(&text, values); err != nil {
		panic(err)
	}
	return text.String()
}

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	rendered := make([][]string, len(cases))
	for index, one := range cases {
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		for _, messages := range one.Conversations {
			rendered[index] = append(rendered[index], render(parsed, one.System, messages))
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(rendered); err != nil {
		panic(err)
	}
}
