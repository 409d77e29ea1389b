package main

import (
	"encoding/binary"
	"io"
	"net"
)

// services are what apps reach in the end. Each returns when it has sent all; the caller ends that direction.
var services = map[string]func(net.Conn){
	"sink":   sink,
	"source": source,
	"echo":   echo,
}

// serviceOrder is also the order of ports: base for the first, base + 1 for the second, ...
var serviceOrder = []string{"sink", "source", "echo"}

const chunk = 256 * 1024

// sink reads to the end and answers how many bytes there were: what counts as delivered is what arrived here.
func sink(conn net.Conn) {
	buffer := make([]byte, chunk)
	var total uint64
	for {
		count, err := conn.Read(buffer)
		total += uint64(count)
		if err == io.EOF {
			break
		}
		if err != nil {
			return
		}
	}
	_, _ = conn.Write(binary.BigEndian.AppendUint64(nil, total))
}

// source sends until it is hung up on.
func source(conn net.Conn) {
	buffer := make([]byte, chunk)
	for {
		if _, err := conn.Write(buffer); err != nil {
			return
		}
	}
}

// echo uses a small buffer: thousands of connections wait in here.
func echo(conn net.Conn) {
	buffer := make([]byte, 4096)
	for {
		count, err := conn.Read(buffer)
		if count > 0 {
			if _, err := conn.Write(buffer[:count]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
