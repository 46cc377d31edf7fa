// Command clients runs the unmodified clients of one library against an etcd and prints what they see.
//
// Usage: clients CLIENT ADDRESS SERVICE. ADDRESS is the etcd's, or the DNS server's for dns; SERVICE is what the client
// calls the service that it resolves. Each line that begins with "seen " holds a JSON object: a list as the client has it.
// Everything else is the library's own log. It must never write to the etcd.
package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// interval is how often a client without notifications is asked for its list; it costs no request to etcd, but for dns.
const interval = 50 * time.Millisecond

// clients are the libraries by the name that the command line has. None of them returns but with an error.
var clients = map[string]func(ctx context.Context, address, service string) error{
	"dns":      resolveDNS,
	"go-kit":   resolveGoKit,
	"go-micro": resolveGoMicro,
	"go-zero":  resolveGoZero,
	"grpc":     resolveGRPC,
	"hertz":    resolveHertz,
	"kitex":    resolveKitex,
	"kratos":   resolveKratos,
}

func main() {
	if len(os.Args) != 4 || clients[os.Args[1]] == nil {
		names := make([]string, 0, len(clients))
		for name := range clients {
			names = append(names, name)
		}
		slices.Sort(names)
		fmt.Fprintf(os.Stderr, "usage: clients CLIENT ADDRESS SERVICE, where CLIENT is one of %v\n", names)
		os.Exit(2)
	}
	if err := clients[os.Args[1]](context.Background(), os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// connect gives a client of etcd as its own documentation makes one.
func connect(address string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{Endpoints: []string{address}, DialTimeout: 5 * time.Second})
}
