package main

import (
	"context"
	"io"
	"os"
	"time"

	kit "github.com/go-kit/kit/endpoint"
	"github.com/go-kit/kit/sd"
	"github.com/go-kit/kit/sd/etcdv3"
	"github.com/go-kit/log"
)

// resolveGoKit keeps an endpoint for each instance below a prefix, and asks each who it is.
func resolveGoKit(ctx context.Context, address, service string) error {
	client, err := etcdv3.NewClient(ctx, []string{address}, etcdv3.ClientOptions{})
	if err != nil {
		return err
	}
	logger := log.NewLogfmtLogger(os.Stderr)
	instancer, err := etcdv3.NewInstancer(client, service, logger)
	if err != nil {
		return err
	}
	factory := func(instance string) (kit.Endpoint, io.Closer, error) {
		return func(context.Context, any) (any, error) { return instance, nil }, nil, nil
	}
	endpointer := sd.NewEndpointer(instancer, factory, logger)
	var report report
	for ; ; time.Sleep(interval) {
		endpoints, err := endpointer.Endpoints()
		if err != nil {
			return err
		}
		var list []endpoint
		for _, one := range endpoints {
			instance, err := one(ctx, nil)
			if err != nil {
				return err
			}
			list = append(list, endpoint{Address: instance.(string)})
		}
		report.see(list)
	}
}
