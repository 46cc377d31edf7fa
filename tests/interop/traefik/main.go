// Command traefik runs Traefik's own provider for etcd and prints the servers that it finds.
//
// Usage: traefik ETCD SERVICE, such as 127.0.0.1:2379 and shop.web.http. Each line that begins with "seen " holds a JSON
// object: the servers of the service as Traefik has them. Everything else is the provider's own log.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/traefik/traefik/v3/pkg/config/dynamic"
	"github.com/traefik/traefik/v3/pkg/provider/kv/etcd"
	"github.com/traefik/traefik/v3/pkg/safe"
)

// endpoint is one server of the service.
type endpoint struct {
	Address string `json:"address"`
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: traefik ETCD SERVICE")
		os.Exit(2)
	}
	if err := provide(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func provide(address, service string) error {
	var provider etcd.Provider
	provider.SetDefaults()
	provider.Endpoints = []string{address}
	if err := provider.Init(); err != nil {
		return err
	}
	configurations := make(chan dynamic.Message)
	failed := make(chan error, 1)
	go func() { failed <- provider.Provide(configurations, safe.NewPool(context.Background())) }()
	var last []endpoint
	for {
		select {
		case err := <-failed:
			if err != nil {
				return err
			}
		case message := <-configurations:
			list, err := servers(message.Configuration, service)
			if err != nil {
				return err
			}
			if last != nil && slices.Equal(list, last) {
				continue
			}
			last = list
			line, err := json.Marshal(struct {
				// At is the time in microseconds since 1970.
				At        int64      `json:"at"`
				Endpoints []endpoint `json:"endpoints"`
			}{time.Now().UnixMicro(), list})
			if err != nil {
				return err
			}
			// One write, so that no log line stands within it.
			if _, err := os.Stdout.WriteString("\nseen " + string(line) + "\n"); err != nil {
				return err
			}
		}
	}
}

// servers gives the servers of an HTTP service, sorted. It is never nil.
func servers(configuration *dynamic.Configuration, service string) ([]endpoint, error) {
	list := []endpoint{}
	if configuration.HTTP == nil || configuration.HTTP.Services[service] == nil {
		return list, nil
	}
	for _, server := range configuration.HTTP.Services[service].LoadBalancer.Servers {
		address, ok := strings.CutPrefix(server.URL, "http://")
		if !ok || server.Weight == nil || *server.Weight != 100 {
			return nil, fmt.Errorf("a server that was not written so: %+v", server)
		}
		list = append(list, endpoint{Address: address})
	}
	slices.SortFunc(list, func(a, b endpoint) int { return strings.Compare(a.Address, b.Address) })
	return list, nil
}
