package main

import (
	"context"
	"time"

	"github.com/go-kratos/kratos/contrib/registry/etcd/v2"
	"github.com/go-kratos/kratos/v2/selector"
	kratos "github.com/go-kratos/kratos/v2/transport/grpc"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// resolveKratos calls through a channel of Kratos, and reports the nodes from which its balancer chooses.
func resolveKratos(ctx context.Context, address, service string) error {
	client, err := connect(address)
	if err != nil {
		return err
	}
	var behind servers
	var nodes []endpoint
	filter := func(_ context.Context, all []selector.Node) []selector.Node {
		nodes = nodes[:0]
		for _, node := range all {
			nodes = append(nodes, endpoint{Address: node.Address(), Pod: node.Metadata()["pod"]})
		}
		return all
	}
	channel, err := kratos.DialInsecure(
		ctx,
		kratos.WithEndpoint("discovery:///"+service),
		kratos.WithDiscovery(etcd.New(client)),
		kratos.WithNodeFilter(filter),
		kratos.WithOptions(grpc.WithContextDialer(behind.dial)),
	)
	if err != nil {
		return err
	}
	health := healthpb.NewHealthClient(channel)
	var report report
	for ; ; time.Sleep(interval) {
		// Without any server that can be called the balancer is not asked, and the call ends after its time-out.
		nodes = nodes[:0]
		_, _ = health.Check(ctx, &healthpb.HealthCheckRequest{})
		report.see(nodes)
	}
}
