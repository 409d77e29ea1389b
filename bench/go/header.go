package main

import (
	"encoding/binary"
	"errors"
	"io"
)

// The binding header: u16 little-endian length, then protobuf. Request: 1 host (string), 2 port (varint).
// Response: empty is a success, which is all that this ingress says.

func encodeRequest(host string, port int) []byte {
	body := append([]byte{1<<3 | 2, byte(len(host))}, host...)
	body = binary.AppendUvarint(append(body, 2<<3), uint64(port))
	return append(binary.LittleEndian.AppendUint16(nil, uint16(len(body))), body...)
}

// readHost reads a request; the host is its first field, and short.
func readHost(from io.Reader) (string, error) {
	body, err := readFrame(from)
	if err != nil {
		return "", err
	}
	if len(body) < 2 || body[0] != 1<<3|2 || body[1] > 127 || len(body) < 2+int(body[1]) {
		return "", errors.New("not a binding header")
	}
	return string(body[2 : 2+body[1]]), nil
}

func readFrame(from io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(from, length[:]); err != nil {
		return nil, err
	}
	body := make([]byte, binary.LittleEndian.Uint16(length[:]))
	_, err := io.ReadFull(from, body)
	return body, err
}
