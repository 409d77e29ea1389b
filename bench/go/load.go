package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// result is what a load measured; fields that say nothing are left out.
type result struct {
	Seconds  float64 `json:"seconds"`
	Bytes    int64   `json:"bytes,omitempty"`      // of the app, all that the proxy had to carry
	Count    int64   `json:"count,omitempty"`      // requests or connections that succeeded
	Total    int64   `json:"total,omitempty"`      // the same with those of the warm-up, which cost CPU as well
	Failures int64   `json:"failures"`             // and that did not
	Failure  string  `json:"failure,omitempty"`    // the first one
	Gbit     float64 `json:"gbit_s,omitempty"`     // per second
	Rate     float64 `json:"rate,omitempty"`       // per second
	P50      float64 `json:"p50_us,omitempty"`     // microseconds
	P90      float64 `json:"p90_us,omitempty"`     //
	P99      float64 `json:"p99_us,omitempty"`     //
	Worst    float64 `json:"worst_us,omitempty"`   //
	Connect  float64 `json:"connect_us,omitempty"` // median of connect() alone
}

// settings are what every load knows.
type settings struct {
	address string
	length  time.Duration
	conns   int
	perSec  float64
	size    int
	timeout time.Duration
	warmUp  time.Duration
}

func load(arguments []string) error {
	var s settings
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	kind := flags.String("kind", "", "up, down, ask, open, paced or hold")
	flags.StringVar(&s.address, "address", "", "where to")
	flags.DurationVar(&s.length, "for", 3*time.Second, "how long")
	flags.IntVar(&s.conns, "connections", 1, "how many at the same time")
	flags.Float64Var(&s.perSec, "rate", 40, "new connections per second (paced)")
	flags.IntVar(&s.size, "size", 64, "bytes of a request, and of its answer")
	flags.DurationVar(&s.timeout, "timeout", 15*time.Second, "after which a connection has failed")
	flags.DurationVar(&s.warmUp, "warm-up", 300*time.Millisecond, "before measuring")
	_ = flags.Parse(arguments)

	kinds := map[string]func(settings) result{
		"up": up, "down": down, "ask": ask, "open": open, "paced": paced, "hold": hold,
	}
	run, known := kinds[*kind]
	if !known {
		return fmt.Errorf("no such load: %q", *kind)
	}
	return json.NewEncoder(os.Stdout).Encode(run(s))
}

func (s settings) dial() (net.Conn, error) {
	conn, err := net.DialTimeout("tcp4", s.address, s.timeout)
	if err != nil {
		return nil, err
	}
	return conn, conn.SetDeadline(time.Now().Add(s.timeout + s.warmUp + s.length))
}

// samples collects durations of successes and counts failures, from many goroutines.
type samples struct {
	lock     sync.Mutex
	times    []time.Duration
	connects []time.Duration
	total    atomic.Int64
	failures atomic.Int64
	failure  atomic.Value
}

func (c *samples) add(times, connects []time.Duration) {
	c.lock.Lock()
	defer c.lock.Unlock()
	c.times = append(c.times, times...)
	c.connects = append(c.connects, connects...)
}

func (c *samples) fail(err error) {
	c.failures.Add(1)
	c.failure.CompareAndSwap(nil, err.Error())
}

func (c *samples) result(elapsed time.Duration) result {
	r := result{Seconds: elapsed.Seconds(), Count: int64(len(c.times)), Total: c.total.Load(), Failures: c.failures.Load()}
	r.Failure, _ = c.failure.Load().(string)
	r.Rate = float64(r.Count) / elapsed.Seconds()
	slices.Sort(c.times)
	slices.Sort(c.connects)
	r.P50, r.P90, r.P99 = quantile(c.times, 0.5), quantile(c.times, 0.9), quantile(c.times, 0.99)
	r.Worst, r.Connect = quantile(c.times, 1), quantile(c.connects, 0.5)
	return r
}

// quantile of sorted durations, in microseconds: the smallest that at least that share does not exceed.
func quantile(sorted []time.Duration, share float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	at := min(len(sorted)-1, int(share*float64(len(sorted))))
	return float64(sorted[at].Nanoseconds()) / 1000
}
