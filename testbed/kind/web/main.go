// web is the workload of tests/kind: a server that tells its name, with a readiness probe and a switch for it.
//
//	web serve                 GET / tells the pod, GET /ready is the probe, POST /switch turns it over
//	web call URL...           GETs each URL and prints what came
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) > 2 && os.Args[1] == "call" {
		os.Exit(call(os.Args[2:]))
	}
	serve()
}

func serve() {
	name, _ := os.Hostname()
	var ready atomic.Bool
	ready.Store(true)
	http.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, name) })
	http.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if !ready.Load() {
			http.Error(w, "switched off", http.StatusServiceUnavailable)
		}
	})
	http.HandleFunc("POST /switch", func(_ http.ResponseWriter, r *http.Request) {
		ready.Store(r.URL.Query().Get("ready") == "true")
	})
	// Goes on for a while, as a server does that drains its connections.
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	go func() {
		<-stop
		time.Sleep(2 * time.Second)
		os.Exit(0)
	}()
	fmt.Fprintln(os.Stderr, http.ListenAndServe(":8080", nil))
	os.Exit(1)
}

func call(urls []string) int {
	client := http.Client{Timeout: 5 * time.Second}
	code := 0
	for _, url := range urls {
		answer, err := client.Get(url)
		if err != nil {
			fmt.Println(url, err)
			code = 1
			continue
		}
		body, _ := io.ReadAll(answer.Body)
		answer.Body.Close()
		fmt.Printf("%s %s %s", url, answer.Status, body)
	}
	return code
}
