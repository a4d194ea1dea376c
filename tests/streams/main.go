// SPDX-License-Identifier: Apache-2.0

// Command streams is a client of CRI's streaming server that is built from the
// library kubectl is built from. The suite runs it beside its own WebSocket
// client, so that SPDY, and Kubernetes' own code, are tested, too.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"

	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	utilexec "k8s.io/client-go/util/exec"
)

const usage = `usage:
  streams [-protocol spdy|websocket] [-stdin] [-tty [-size COLUMNSxROWS,...]] run URL
      exec or attach: relays the standard streams, ends with the exit code; the
      terminal has the next of the sizes with each SIGWINCH
  streams forward URL PORT
      listens on a local port that is printed, forwards until standard input ends`

// v4 is the newest of the WebSocket protocols that CRI's streaming server has.
const v4 = "v4.channel.k8s.io"

// failure is the exit code of streams itself, which no shell uses.
const failure = 250

func main() {
	protocol := flag.String("protocol", "spdy", "spdy or websocket")
	stdin := flag.Bool("stdin", false, "send standard input")
	tty := flag.Bool("tty", false, "the process has a terminal")
	size := flag.String("size", "", "the terminal's, columns x rows, and those that follow")
	flag.Usage = func() { fmt.Fprintln(os.Stderr, usage) }
	flag.Parse()
	var err error
	switch {
	case flag.NArg() == 2 && flag.Arg(0) == "run":
		err = run(*protocol, flag.Arg(1), *stdin, *tty, *size)
	case flag.NArg() == 3 && flag.Arg(0) == "forward":
		err = forward(flag.Arg(1), flag.Arg(2))
	default:
		flag.Usage()
		os.Exit(failure)
	}
	var code utilexec.CodeExitError
	if errors.As(err, &code) {
		os.Exit(code.Code)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "streams:", err)
		os.Exit(failure)
	}
}

// sizes is a terminal that has the next of them with each SIGWINCH.
type sizes struct {
	rest    []remotecommand.TerminalSize
	changed chan os.Signal
}

func terminal(list string) (*sizes, error) {
	terminal := &sizes{changed: make(chan os.Signal, 1)}
	for _, size := range strings.Split(list, ",") {
		var of remotecommand.TerminalSize
		if _, err := fmt.Sscanf(size, "%dx%d", &of.Width, &of.Height); err != nil {
			return nil, err
		}
		terminal.rest = append(terminal.rest, of)
	}
	// The first one is there from the begin.
	terminal.changed <- syscall.SIGWINCH
	signal.Notify(terminal.changed, syscall.SIGWINCH)
	return terminal, nil
}

func (s *sizes) Next() *remotecommand.TerminalSize {
	if len(s.rest) == 0 {
		return nil
	}
	<-s.changed
	size := s.rest[0]
	s.rest = s.rest[1:]
	return &size
}

func run(protocol, address string, stdin, tty bool, size string) error {
	target, err := url.Parse(address)
	if err != nil {
		return err
	}
	config := &restclient.Config{Host: target.Host}
	var executor remotecommand.Executor
	switch protocol {
	case "spdy":
		executor, err = remotecommand.NewSPDYExecutor(config, http.MethodPost, target)
	case "websocket":
		// containerd's server knows no newer one; it cannot tell the end of input.
		executor, err = remotecommand.NewWebSocketExecutorForProtocols(
			config, http.MethodGet, address, v4)
	default:
		err = fmt.Errorf("protocol %q is neither spdy nor websocket", protocol)
	}
	if err != nil {
		return err
	}
	options := remotecommand.StreamOptions{Stdout: os.Stdout, Tty: tty}
	if stdin {
		options.Stdin = os.Stdin
	}
	if !tty {
		options.Stderr = os.Stderr
	}
	if size != "" {
		terminal, err := terminal(size)
		if err != nil {
			return err
		}
		options.TerminalSizeQueue = terminal
	}
	context, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	return executor.StreamWithContext(context, options)
}

func forward(address, port string) error {
	target, err := url.Parse(address)
	if err != nil {
		return err
	}
	transport, upgrader, err := spdy.RoundTripperFor(&restclient.Config{Host: target.Host})
	if err != nil {
		return err
	}
	dialer := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, target)
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.New(dialer, []string{"0:" + port}, stop, ready, io.Discard, os.Stderr)
	if err != nil {
		return err
	}
	go func() {
		<-ready
		ports, err := forwarder.GetPorts()
		if err != nil {
			fmt.Fprintln(os.Stderr, "streams:", err)
			os.Exit(failure)
		}
		fmt.Println(ports[0].Local)
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(stop)
	}()
	return forwarder.ForwardPorts()
}
