package main

import (
	"context"
	"time"

	"github.com/cloudwego/kitex/pkg/loadbalance"
	"github.com/cloudwego/kitex/pkg/loadbalance/lbcache"
	"github.com/cloudwego/kitex/pkg/rpcinfo"
	etcd "github.com/kitex-contrib/registry-etcd"
)

// resolveKitex keeps and picks instances as Kitex's own client does, with its defaults, and reports those that it keeps.
func resolveKitex(ctx context.Context, address, service string) error {
	resolver, err := etcd.NewEtcdResolver([]string{address})
	if err != nil {
		return err
	}
	factory := lbcache.NewBalancerFactory(resolver, loadbalance.NewWeightedBalancer(), lbcache.Options{})
	target := rpcinfo.NewEndpointInfo(service, "Echo", nil, nil)
	var report report
	for ; ; time.Sleep(interval) {
		var list []endpoint
		// An error says that there is none, and none was kept.
		if balancer, err := factory.Get(ctx, target); err == nil && balancer.GetPicker().Next(ctx, nil) != nil {
			result, _ := balancer.GetResult()
			for _, instance := range result.Instances {
				pod, _ := instance.Tag("pod")
				list = append(list, endpoint{Address: instance.Address().String(), Pod: pod})
			}
		}
		report.see(list)
	}
}
