// Bench holds the compiled half of the benchmark: everything in the path that is not what is being measured.
//
//	bench ingress   the far side: a binding ingress over TLS 1.3, the same without its header, and plain TCP
//	bench forward   the peer: kernel listener, one TLS dial per connection, header, two copies
//	bench link      two TUN devices with a delay in between: a long cable
//	bench load      an app, or many: prints what it measured as one JSON object
//
// Every command that serves prints "ready" when it does, and ends when its standard input ends: nothing is left behind.
package main

import (
	"fmt"
	"io"
	"os"
)

func main() {
	if len(os.Args) < 2 {
		fatal(fmt.Errorf("which one: ingress, forward, link or load?"))
	}
	command, arguments := os.Args[1], os.Args[2:]
	var err error
	switch command {
	case "ingress":
		err = ingress(arguments)
	case "forward":
		err = forward(arguments)
	case "link":
		err = link(arguments)
	case "load":
		err = load(arguments)
	default:
		err = fmt.Errorf("no such command: %s", command)
	}
	if err != nil {
		fatal(err)
	}
}

// serveUntilOrphaned says that everything listens, and returns when the parent process is gone or wants it.
func serveUntilOrphaned() {
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "bench:", err)
	os.Exit(1)
}
