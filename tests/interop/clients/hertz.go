package main

import (
	"context"
	"time"

	"github.com/cloudwego/hertz/pkg/app/client"
	"github.com/cloudwego/hertz/pkg/app/client/discovery"
	"github.com/cloudwego/hertz/pkg/app/client/loadbalance"
	"github.com/cloudwego/hertz/pkg/app/middlewares/client/sd"
	"github.com/cloudwego/hertz/pkg/common/config"
	"github.com/cloudwego/hertz/pkg/protocol"
	"github.com/hertz-contrib/registry/etcd"
)

// observed is Hertz's own balancer, and remembers the list from which it was last asked to choose.
type observed struct {
	loadbalance.Loadbalancer
	last []endpoint
}

// Pick implements loadbalance.Loadbalancer.
func (o *observed) Pick(result discovery.Result) discovery.Instance {
	o.last = o.last[:0]
	for _, instance := range result.Instances {
		pod, _ := instance.Tag("pod")
		o.last = append(o.last, endpoint{Address: instance.Address().String(), Pod: pod})
	}
	return o.Loadbalancer.Pick(result)
}

// resolveHertz sends requests through Hertz's client with its discovery, up to where they would go to the network.
func resolveHertz(ctx context.Context, address, service string) error {
	resolver, err := etcd.NewEtcdResolver([]string{address})
	if err != nil {
		return err
	}
	hertz, err := client.NewClient()
	if err != nil {
		return err
	}
	balancer := observed{Loadbalancer: loadbalance.NewWeightedBalancer()}
	hertz.Use(sd.Discovery(resolver, sd.WithLoadBalanceOptions(&balancer, loadbalance.DefaultLbOpts)))
	err = hertz.UseAsLast(func(client.Endpoint) client.Endpoint {
		return func(context.Context, *protocol.Request, *protocol.Response) error { return nil }
	})
	if err != nil {
		return err
	}
	var report report
	for ; ; time.Sleep(interval) {
		// An error says that there is none.
		if _, _, err := hertz.Get(ctx, nil, "http://"+service+"/", config.WithSD(true)); err != nil {
			balancer.last = balancer.last[:0]
		}
		report.see(balancer.last)
	}
}
