package main

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"time"
)

// endpoint is one entry of a client's list.
type endpoint struct {
	// Address is host:port, an IPv6 host in brackets.
	Address string `json:"address"`
	// Pod is the pod's name, where the client's record tells it.
	Pod string `json:"pod,omitempty"`
}

// report prints a list each time when it is another one than before.
type report struct {
	last  []endpoint
	began bool
}

// see takes the list that a client has now, in any order. An entry that is there twice stays so.
func (r *report) see(list []endpoint) {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b endpoint) int {
		return strings.Compare(a.Address+" "+a.Pod, b.Address+" "+b.Pod)
	})
	if r.began && slices.Equal(list, r.last) {
		return
	}
	r.began, r.last = true, list
	if list == nil {
		list = []endpoint{}
	}
	line, err := json.Marshal(struct {
		// At is the time in microseconds since 1970.
		At        int64      `json:"at"`
		Endpoints []endpoint `json:"endpoints"`
	}{time.Now().UnixMicro(), list})
	if err != nil {
		panic(err)
	}
	// One write, so that no log line of the library stands within it.
	if _, err := os.Stdout.WriteString("\nseen " + string(line) + "\n"); err != nil {
		panic(err)
	}
}

// plain makes a list of addresses alone.
func plain(addresses []string) []endpoint {
	list := make([]endpoint, 0, len(addresses))
	for _, address := range addresses {
		list = append(list, endpoint{Address: address})
	}
	return list
}
