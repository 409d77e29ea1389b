package main

import (
	"crypto/tls"
	"errors"
	"flag"
	"io"
	"net"
)

// forward is what the daemon is measured against: a forwarder as it is usually written. A kernel listener for each
// endpoint; for each connection one TLS dial with a client certificate, the header, and two copies that pass on the
// end of each direction. TCP_NODELAY is Go's default. -resume remembers session tickets, which few programs do.
func forward(arguments []string) error {
	flags := flag.NewFlagSet("forward", flag.ExitOnError)
	base := flags.Int("port", 18470, "listen here for the first service, on the next port for the next one, ...")
	target := flags.String("ingress", "127.0.0.1:18444", "the ingress")
	certificate := flags.String("certificate", "", "PEM file: certificate chain and key")
	ca := flags.String("ca", "", "PEM file: who signed the ingress")
	resume := flags.Bool("resume", false, "resume TLS sessions")
	_ = flags.Parse(arguments)

	pair, pool, err := identity(*certificate, *ca)
	if err != nil {
		return err
	}
	config := &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool}
	if *resume {
		config.ClientSessionCache = tls.NewLRUClientSessionCache(64)
	}
	for index, service := range serviceOrder {
		header := encodeRequest(service+".bench", 7000)
		err = errors.Join(err, serve("127.0.0.1", *base+index, func(app net.Conn) {
			forwardOne(app.(*net.TCPConn), *target, config, header)
		}))
	}
	if err != nil {
		return err
	}
	serveUntilOrphaned()
	return nil
}

func forwardOne(app *net.TCPConn, target string, config *tls.Config, header []byte) {
	ingress, err := tls.Dial("tcp", target, config)
	if err == nil {
		defer ingress.Close()
		if _, err = ingress.Write(header); err == nil {
			_, err = readFrame(ingress)
		}
	}
	if err != nil {
		_ = app.SetLinger(0) // an app whose connection leads nowhere gets a reset
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(ingress, app)
		_ = ingress.CloseWrite()
	}()
	_, _ = io.Copy(app, ingress)
	_ = app.CloseWrite()
	<-done
}
