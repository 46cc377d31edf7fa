package main

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// resolveDNS asks a DNS server for the SRV records of a service's port, for each target's A and AAAA, and for those of the
// service itself. SERVICE is _PORT._PROTOCOL.SERVICE.NAMESPACE.ZONE.
func resolveDNS(ctx context.Context, address, service string) error {
	labels := strings.SplitN(service, ".", 3)
	if len(labels) < 3 {
		return fmt.Errorf("%s is not _PORT._PROTOCOL.SERVICE.ZONE", service)
	}
	// What every resolver of today asks for; 512 bytes would hold few targets.
	const size = 4096
	client := dns.Client{Timeout: 5 * time.Second, UDPSize: size}
	ask := func(name string, kind uint16) ([]dns.RR, error) {
		question := new(dns.Msg)
		question.SetQuestion(dns.Fqdn(name), kind)
		question.SetEdns0(size, false)
		answer, _, err := client.ExchangeContext(ctx, question, address)
		if err != nil {
			return nil, err
		}
		// Neither is an error: the one says that the name is not there, the other has no answer of this kind.
		if answer.Rcode != dns.RcodeSuccess && answer.Rcode != dns.RcodeNameError {
			return nil, fmt.Errorf("%s: %s", name, dns.RcodeToString[answer.Rcode])
		}
		if answer.Truncated {
			return nil, fmt.Errorf("%s: the answer is truncated", name)
		}
		return answer.Answer, nil
	}
	// The addresses of a name, IPv4 and IPv6.
	addresses := func(name string) ([]string, error) {
		var hosts []string
		for _, kind := range []uint16{dns.TypeA, dns.TypeAAAA} {
			answers, err := ask(name, kind)
			if err != nil {
				return nil, err
			}
			for _, answer := range answers {
				switch answer := answer.(type) {
				case *dns.A:
					hosts = append(hosts, answer.A.String())
				case *dns.AAAA:
					hosts = append(hosts, answer.AAAA.String())
				default:
					return nil, fmt.Errorf("not an address: %s", answer)
				}
			}
		}
		slices.Sort(hosts)
		return hosts, nil
	}
	resolve := func() ([]endpoint, error) {
		answers, err := ask(service, dns.TypeSRV)
		if err != nil {
			return nil, err
		}
		var list []endpoint
		var hosts []string
		targets := make(map[string]struct{})
		for _, answer := range answers {
			srv, ok := answer.(*dns.SRV)
			if !ok {
				return nil, fmt.Errorf("not an SRV: %s", answer)
			}
			// A target with both families may be answered once for each.
			target := net.JoinHostPort(srv.Target, strconv.Itoa(int(srv.Port)))
			if _, seen := targets[target]; seen {
				continue
			}
			targets[target] = struct{}{}
			found, err := addresses(srv.Target)
			if err != nil {
				return nil, err
			}
			hosts = append(hosts, found...)
			for _, host := range found {
				list = append(list, endpoint{
					Address: net.JoinHostPort(host, strconv.Itoa(int(srv.Port))),
					// A target is POD.CLUSTER._PORT._PROTOCOL...
					Pod: strings.SplitN(srv.Target, ".", 2)[0],
				})
			}
		}
		slices.Sort(hosts)
		direct, err := addresses(labels[2])
		if err != nil {
			return nil, err
		}
		if !slices.Equal(hosts, direct) {
			return nil, fmt.Errorf("SRV leads to %v, A and AAAA to %v", hosts, direct)
		}
		return list, nil
	}
	var report report
	for ; ; time.Sleep(interval) {
		list, err := resolve()
		// Between two questions the records may have changed.
		if err != nil {
			fmt.Println(err)
			continue
		}
		report.see(list)
	}
}
