// SPDX-License-Identifier: Apache-2.0

// Command peer is the server that forwarded ports lead to. Its arguments are
// MODE=ADDRESS:PORT each:
//
//	echo    gives everything back
//	sink    reads to the end, answers with count and SHA-256, ends
//	source  sends SIZE bytes and ends
//	half    sends SIZE bytes, ends its side, reads to the end
//	reset   reads a byte and resets
//	cut     sends SIZE bytes, reads a byte and resets
//	early   reads a byte, sends ANSWER bytes and hangs up on what it did not read
//	late    reads nothing for three seconds, then as sink
//
// It says "ready" once it listens everywhere, and a line per connection:
// MODE END COUNT SHA-256, where END is how the client ended: end, reset or the
// error's name.
package main

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

// Size is what source, half and cut send: 32-bit numbers from 0 on, big endian.
const Size = 1 << 20

// Answer is what early sends of them: what the other socket takes at once, for hanging up takes the rest back.
const Answer = 1 << 14

func main() {
	for _, argument := range os.Args[1:] {
		mode, address, found := strings.Cut(argument, "=")
		if !found {
			fail(fmt.Errorf("%q is not MODE=ADDRESS:PORT", argument))
		}
		network := "tcp4"
		if strings.HasPrefix(address, "[") {
			network = "tcp6"
		}
		listener, err := net.Listen(network, address)
		if err != nil {
			fail(err)
		}
		go serve(mode, listener)
	}
	fmt.Println("ready")
	select {}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "peer:", err)
	os.Exit(1)
}

func serve(mode string, listener net.Listener) {
	for {
		connection, err := listener.Accept()
		if err != nil {
			fail(err)
		}
		go func() {
			tcp := connection.(*net.TCPConn)
			seen := &count{hash: sha256.New()}
			err := handle(mode, tcp, seen)
			fmt.Println(mode, ending(err), seen)
			tcp.Close()
		}()
	}
}

func handle(mode string, tcp *net.TCPConn, seen *count) error {
	from := io.TeeReader(tcp, seen)
	switch mode {
	case "echo":
		_, err := io.Copy(tcp, from)
		return err
	case "late":
		time.Sleep(3 * time.Second)
		fallthrough
	case "sink":
		if _, err := io.Copy(io.Discard, from); err != nil {
			return err
		}
		_, err := fmt.Fprintln(tcp, seen)
		return err
	case "source", "half":
		if _, err := tcp.Write(numbers()); err != nil {
			return err
		}
		if mode == "source" {
			return nil
		}
		if err := tcp.CloseWrite(); err != nil {
			return err
		}
		_, err := io.Copy(io.Discard, from)
		return err
	case "early":
		if _, err := from.Read(make([]byte, 1)); err != nil {
			return err
		}
		_, err := tcp.Write(numbers()[:Answer])
		return err
	case "cut":
		if _, err := tcp.Write(numbers()); err != nil {
			return err
		}
		fallthrough
	case "reset":
		if _, err := from.Read(make([]byte, 1)); err != nil {
			return err
		}
		return tcp.SetLinger(0)
	}
	return fmt.Errorf("no mode %q", mode)
}

func numbers() []byte {
	bytes := make([]byte, Size)
	for i := 0; i < Size; i += 4 {
		binary.BigEndian.PutUint32(bytes[i:], uint32(i/4))
	}
	return bytes
}

func ending(err error) string {
	var errno syscall.Errno
	switch {
	case err == nil:
		return "end"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "reset"
	case errors.As(err, &errno):
		return strings.ReplaceAll(errno.Error(), " ", "-")
	}
	return "failure"
}

type count struct {
	bytes int
	hash  hash.Hash
}

func (c *count) Write(bytes []byte) (int, error) {
	c.bytes += len(bytes)
	return c.hash.Write(bytes)
}

func (c *count) String() string {
	return fmt.Sprintf("%d %x", c.bytes, c.hash.Sum(nil))
}
