package main

import (
	"io"
	"net"
	"sync"
	"time"
)

// ask sends a request on each open connection, waits for its answer, and so on: latency with one connection, rate
// with many.
func ask(s settings) result {
	var collected samples
	conns := openMany(s, &collected)
	var group sync.WaitGroup
	from := time.Now().Add(s.warmUp)
	until := from.Add(s.length)
	for _, conn := range conns {
		group.Go(func() {
			defer conn.Close()
			message := make([]byte, s.size)
			times := make([]time.Duration, 0, 1<<14)
			for {
				started := time.Now()
				if started.After(until) {
					break
				}
				if err := exchange(conn, message); err != nil {
					collected.fail(err)
					break
				}
				collected.total.Add(1)
				if started.After(from) {
					times = append(times, time.Since(started))
				}
			}
			collected.add(times, nil)
		})
	}
	group.Wait()
	return collected.result(s.length)
}

func exchange(conn net.Conn, message []byte) error {
	if _, err := conn.Write(message); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, message)
	return err
}

// openMany opens connections, at most 16 at a time, and asks once on each, so that all of them are known to stand.
func openMany(s settings, collected *samples) []net.Conn {
	const atOnce = 16
	var lock sync.Mutex
	var conns []net.Conn
	var group sync.WaitGroup
	tokens := make(chan struct{}, atOnce)
	for range s.conns {
		tokens <- struct{}{}
		group.Go(func() {
			defer func() { <-tokens }()
			conn, err := s.dial()
			if err == nil {
				err = exchange(conn, make([]byte, s.size))
			}
			if err != nil {
				collected.fail(err)
				return
			}
			lock.Lock()
			defer lock.Unlock()
			conns = append(conns, conn)
		})
	}
	group.Wait()
	return conns
}
