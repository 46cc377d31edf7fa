// Command web is the workload of tests/kind: a server that tells its name, with a readiness probe and a switch for it.
//
//	web                       GET / tells the pod, GET /ready is the probe, POST /switch turns it over, on ports 80 and 8080;
//	                          on port 9090 the health service of gRPC, which tells the pod in the header "pod"
//	web call URL...           GETs each URL and prints what came
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
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
	// Not the default one, where libraries have pages of their own.
	pages := http.NewServeMux()
	pages.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, name) })
	pages.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if !ready.Load() {
			http.Error(w, "switched off", http.StatusServiceUnavailable)
		}
	})
	pages.HandleFunc("POST /switch", func(_ http.ResponseWriter, r *http.Request) {
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
	failed := make(chan error)
	// Port 80 is that of the image which it stands for in docs/install.md.
	for _, address := range []string{":80", ":8080"} {
		go func() { failed <- http.ListenAndServe(address, pages) }()
	}
	go func() { failed <- serveHealth(name) }()
	fmt.Fprintln(os.Stderr, <-failed)
	os.Exit(1)
}

func serveHealth(name string) error {
	listener, err := net.Listen("tcp", ":9090")
	if err != nil {
		return err
	}
	tell := func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		if err := grpc.SetHeader(ctx, metadata.Pairs("pod", name)); err != nil {
			return nil, err
		}
		return handler(ctx, request)
	}
	server := grpc.NewServer(grpc.UnaryInterceptor(tell))
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	return server.Serve(listener)
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
