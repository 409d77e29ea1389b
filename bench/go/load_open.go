package main

import (
	"bufio"
	"fmt"
	"os"
	"sync"
	"time"
)

// connectAndAsk opens a connection, sends one byte and waits for it to come back, then hangs up.
func connectAndAsk(s settings) (connect time.Duration, err error) {
	started := time.Now()
	conn, err := s.dial()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	connect = time.Since(started)
	return connect, exchange(conn, make([]byte, 1))
}

// open opens connection after connection, as many at the same time as asked: the next one as soon as one is done.
func open(s settings) result {
	var collected samples
	var group sync.WaitGroup
	from := time.Now().Add(s.warmUp)
	until := from.Add(s.length)
	for range s.conns {
		group.Go(func() {
			var times, connects []time.Duration
			for {
				started := time.Now()
				if started.After(until) {
					break
				}
				connect, err := connectAndAsk(s)
				if err != nil {
					collected.fail(err)
					time.Sleep(time.Millisecond) // a refusal is quick; do not count a million of them
					continue
				}
				collected.total.Add(1)
				if started.After(from) {
					times, connects = append(times, time.Since(started)), append(connects, connect)
				}
			}
			collected.add(times, connects)
		})
	}
	group.Wait()
	return collected.result(max(time.Since(from), s.length))
}

// paced opens connections at fixed times, however long the earlier ones take. Times count from when a connection was
// due, so that a proxy that holds up the load is charged for it.
func paced(s settings) result {
	var collected samples
	var group sync.WaitGroup
	gap := time.Duration(float64(time.Second) / s.perSec)
	warm := int(s.warmUp / gap)
	count := warm + int(s.length/gap)
	start := time.Now()
	for index := range count {
		due := start.Add(time.Duration(index) * gap)
		time.Sleep(time.Until(due))
		group.Go(func() {
			connect, err := connectAndAsk(s)
			if err != nil {
				collected.fail(err)
				return
			}
			collected.total.Add(1)
			if index >= warm {
				collected.add([]time.Duration{time.Since(due)}, []time.Duration{connect})
			}
		})
	}
	group.Wait()
	return collected.result(time.Since(start.Add(time.Duration(warm) * gap)))
}

// hold opens connections, says so on a line of its own, and keeps them, idle, until a line comes in; then each must
// still carry a request.
func hold(s settings) result {
	var collected samples
	started := time.Now()
	conns := openMany(s, &collected)
	elapsed := time.Since(started)
	fmt.Println("holding", len(conns))
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
	var times []time.Duration
	for _, conn := range conns {
		_ = conn.SetDeadline(time.Now().Add(s.timeout))
		asked := time.Now()
		if err := exchange(conn, make([]byte, s.size)); err != nil {
			collected.fail(err)
		} else {
			times = append(times, time.Since(asked))
		}
		conn.Close()
	}
	collected.add(times, nil)
	r := collected.result(elapsed)
	r.Rate = float64(len(conns)) / elapsed.Seconds()
	return r
}
