package main

import (
	"context"
	"maps"
	"time"

	"go.etcd.io/etcd/client/v3/naming/resolver"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
)

// calls is how many calls make a list: several times as many as there are ever servers, so that each is called in turn.
const calls = 24

// resolveGRPC calls through a channel that is balanced over what etcd's resolver finds, and reports who answered.
func resolveGRPC(ctx context.Context, address, service string) error {
	client, err := connect(address)
	if err != nil {
		return err
	}
	builder, err := resolver.NewBuilder(client)
	if err != nil {
		return err
	}
	var behind servers
	channel, err := grpc.NewClient(
		"etcd:///"+service,
		grpc.WithResolvers(builder),
		grpc.WithContextDialer(behind.dial),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`),
	)
	if err != nil {
		return err
	}
	health := healthpb.NewHealthClient(channel)
	answering := func() map[string]struct{} {
		answered := make(map[string]struct{})
		for range calls {
			var header metadata.MD
			call, cancel := context.WithTimeout(ctx, 5*time.Second)
			_, err := health.Check(call, &healthpb.HealthCheckRequest{}, grpc.Header(&header))
			cancel()
			// Without any server a call fails at once.
			if err == nil {
				answered[header.Get(addressHeader)[0]] = struct{}{}
			}
		}
		return answered
	}
	var report report
	for ; ; time.Sleep(interval) {
		// The balancer begins its round anew at each change; two times the same is a whole round.
		answered := answering()
		if !maps.Equal(answered, answering()) {
			continue
		}
		list := make([]endpoint, 0, len(answered))
		for address := range answered {
			list = append(list, endpoint{Address: address})
		}
		report.see(list)
	}
}
