package main

import (
	"context"

	"github.com/zeromicro/go-zero/core/discov"
)

// resolveGoZero subscribes as go-zero's zrpc clients do.
func resolveGoZero(ctx context.Context, address, service string) error {
	subscriber, err := discov.NewSubscriber([]string{address}, service)
	if err != nil {
		return err
	}
	changed := make(chan struct{}, 1)
	subscriber.AddListener(func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	var report report
	for {
		report.see(plain(subscriber.Values()))
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
