package main

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/go-micro/plugins/v4/registry/etcd"
	"go-micro.dev/v4/registry"
	"go-micro.dev/v4/selector"
)

// resolveGoMicro selects as go-micro's client does, from the selector's cache, and reports the nodes that it has.
func resolveGoMicro(_ context.Context, address, service string) error {
	var list []endpoint
	strategy := func(services []*registry.Service) selector.Next {
		for _, service := range services {
			for _, node := range service.Nodes {
				// The node's id is CLUSTER.NAMESPACE.POD.PORT.FAMILY, and only a pod's name can have dots.
				list = append(list, endpoint{Address: node.Address, Pod: podOf(node.Id)})
			}
		}
		return selector.RoundRobin(services)
	}
	nodes := selector.NewSelector(
		selector.Registry(etcd.NewRegistry(registry.Addrs(address))),
		selector.SetStrategy(strategy),
	)
	var report report
	for ; ; time.Sleep(interval) {
		list = nil
		_, err := nodes.Select(service)
		if err != nil && !errors.Is(err, selector.ErrNotFound) && !errors.Is(err, selector.ErrNoneAvailable) {
			return err
		}
		report.see(list)
	}
}

// podOf gives the pod's name within a node's id.
func podOf(id string) string {
	labels := strings.Split(id, ".")
	if len(labels) < 5 {
		return ""
	}
	return strings.Join(labels[2:len(labels)-2], ".")
}
