package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
)

// ingress serves on four kinds of port: TLS with the binding header, and, for each service, TLS without the header
// (for proxies that know none) and plain TCP (the limit: no proxy at all). Clients need a certificate; session tickets
// are on, as everywhere.
func ingress(arguments []string) error {
	flags := flag.NewFlagSet("ingress", flag.ExitOnError)
	address := flags.String("address", "127.0.0.1", "where to listen")
	port := flags.Int("port", 18444, "TLS with the binding header")
	bare := flags.Int("bare", 18450, "TLS without it, first port")
	plain := flags.Int("plain", 18460, "plain TCP, first port")
	certificate := flags.String("certificate", "", "PEM file: certificate chain and key")
	ca := flags.String("ca", "", "PEM file: who may sign clients")
	_ = flags.Parse(arguments)

	pair, pool, err := identity(*certificate, *ca)
	if err != nil {
		return err
	}
	config := &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{pair},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    pool,
	}
	err = serve(*address, *port, func(conn net.Conn) { serveTLS(conn, config, "") })
	for index, service := range serviceOrder {
		err = errors.Join(err,
			serve(*address, *bare+index, func(conn net.Conn) { serveTLS(conn, config, service) }),
			serve(*address, *plain+index, func(conn net.Conn) { services[service](conn) }),
		)
	}
	if err != nil {
		return err
	}
	serveUntilOrphaned()
	return nil
}

func serveTLS(raw net.Conn, config *tls.Config, service string) {
	conn := tls.Server(raw, config)
	if service == "" {
		host, err := readHost(conn)
		if err != nil {
			return // also a client that only came to keep a connection ready
		}
		service, _, _ = strings.Cut(host, ".")
		if _, err := conn.Write([]byte{0, 0}); err != nil {
			return
		}
	}
	if run, known := services[service]; known {
		run(conn)
	}
	_ = conn.CloseWrite()
}

// serve accepts for ever, each connection in a goroutine of its own that closes it.
func serve(address string, port int, handle func(net.Conn)) error {
	listener, err := net.Listen("tcp4", fmt.Sprintf("%s:%d", address, port))
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				fmt.Fprintln(os.Stderr, "accept:", err)
				time.Sleep(10 * time.Millisecond)
				continue
			}
			go func() {
				defer conn.Close()
				handle(conn)
			}()
		}
	}()
	return nil
}

func identity(certificate, ca string) (tls.Certificate, *x509.CertPool, error) {
	pair, err := tls.LoadX509KeyPair(certificate, certificate)
	if err != nil {
		return pair, nil, err
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return pair, nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return pair, nil, fmt.Errorf("%s holds no certificate", ca)
	}
	return pair, pool, nil
}
