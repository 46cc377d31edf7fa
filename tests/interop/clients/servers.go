package main

import (
	"context"
	"fmt"
	"net"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
)

// addressHeader is the header in which a server tells who it is.
const addressHeader = "address"

// servers are the gRPC servers behind the pods' addresses. No host has those addresses; so the client is given a dialer
// that leads to a server on loopback, one for each address, which is started when it is dialled first.
type servers struct {
	mutex     sync.Mutex
	listening map[string]string
}

// dial is for grpc.WithContextDialer.
func (s *servers) dial(ctx context.Context, address string) (net.Conn, error) {
	local, err := s.local(address)
	if err != nil {
		return nil, err
	}
	fmt.Println("dialled", address)
	var dialer net.Dialer
	return dialer.DialContext(ctx, "tcp", local)
}

func (s *servers) local(address string) (string, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if local, ok := s.listening[address]; ok {
		return local, nil
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	// The health service needs no generated code of one's own.
	server := grpc.NewServer(grpc.UnaryInterceptor(
		func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			if err := grpc.SetHeader(ctx, metadata.Pairs(addressHeader, address)); err != nil {
				return nil, err
			}
			return handle(ctx, request)
		},
	))
	healthpb.RegisterHealthServer(server, health.NewServer())
	go func() {
		if err := server.Serve(listener); err != nil {
			panic(err)
		}
	}()
	if s.listening == nil {
		s.listening = make(map[string]string)
	}
	local := listener.Addr().String()
	s.listening[address] = local
	return local, nil
}
