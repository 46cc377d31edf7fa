// Command coredns is CoreDNS with fewer plugins: its own main, with the plugins bind, errors and etcd and no others. All of them
// would take hundreds of modules that have nothing to do with etcd.
package main

import (
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/etcd"
)

func main() {
	coremain.Run()
}
