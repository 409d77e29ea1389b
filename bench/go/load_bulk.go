package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// up writes on all connections for the whole time, then ends its direction and waits for the sink to say how much
// arrived: the rate is that of delivered bytes, up to the moment the last of them was confirmed.
func up(s settings) result {
	return bulk(s, func(conn net.Conn, counted *atomic.Int64, end time.Time) error {
		block := make([]byte, chunk)
		sent := int64(0)
		for time.Now().Before(end) {
			count, err := conn.Write(block)
			sent += int64(count)
			counted.Add(int64(count))
			if err != nil {
				return err
			}
		}
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			return err
		}
		var answer [8]byte
		if _, err := io.ReadFull(conn, answer[:]); err != nil {
			return fmt.Errorf("no word of what arrived: %w", err)
		}
		if arrived := int64(binary.BigEndian.Uint64(answer[:])); arrived != sent {
			return fmt.Errorf("%d bytes sent, %d arrived", sent, arrived)
		}
		return nil
	})
}

func down(s settings) result {
	return bulk(s, func(conn net.Conn, counted *atomic.Int64, end time.Time) error {
		buffer := make([]byte, chunk)
		for time.Now().Before(end) {
			count, err := conn.Read(buffer)
			counted.Add(int64(count))
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func bulk(s settings, run func(net.Conn, *atomic.Int64, time.Time) error) result {
	var collected samples
	var counted atomic.Int64
	var group sync.WaitGroup
	started := time.Now()
	for range s.conns {
		conn, err := s.dial()
		if err != nil {
			collected.fail(err)
			continue
		}
		group.Go(func() {
			defer conn.Close()
			if err := run(conn, &counted, started.Add(s.warmUp+s.length)); err != nil {
				collected.fail(err)
			}
		})
	}
	time.Sleep(time.Until(started.Add(s.warmUp)))
	before, from := counted.Load(), time.Now()
	group.Wait()
	elapsed := time.Since(from)
	r := collected.result(elapsed)
	r.Bytes = counted.Load()
	r.Gbit = float64(r.Bytes-before) * 8 / 1e9 / elapsed.Seconds()
	r.Rate = 0
	return r
}
