package main

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"
	"unsafe"
)

// link makes two TUN devices and carries every packet from one to the other, each a fixed time later. A delay between
// packets, not between connections: handshakes, acknowledgements and slow start all cost the round trips they cost on
// a real long line. Nothing is lost, reordered or shaped.
//
// Both devices have the virtio header and offloads, so what one kernel left unfinished (checksums, segmentation) the
// other never has to do, and a packet of up to 64 KiB crosses as one.
func link(arguments []string) error {
	flags := flag.NewFlagSet("link", flag.ExitOnError)
	near := flags.String("near", "near0", "name of one device")
	far := flags.String("far", "far0", "name of the other")
	delay := flags.Duration("delay", 25*time.Millisecond, "each way")
	_ = flags.Parse(arguments)

	a, err := openTUN(*near)
	if err != nil {
		return err
	}
	b, err := openTUN(*far)
	if err != nil {
		return err
	}
	carry(a, b, *delay)
	carry(b, a, *delay)
	serveUntilOrphaned()
	return nil
}

const (
	tunSetIff        = 0x400454ca
	tunSetOffload    = 0x400454d0
	iffTUN           = 0x0001
	iffNoPI          = 0x1000
	iffVnetHdr       = 0x4000
	offloadCsum      = 0x01
	offloadTSO4      = 0x02
	offloadTSO6      = 0x04
	largest          = 10 + 65535
	packetsUnderWay  = 1 << 16
	ifNameSize       = 16
	ifreqSize        = 40
	finestNap        = 20 * time.Microsecond
	deviceIsDownPoll = 10 * time.Millisecond
)

func openTUN(name string) (int, error) {
	fd, err := syscall.Open("/dev/net/tun", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("/dev/net/tun: %w", err)
	}
	var request [ifreqSize]byte
	copy(request[:ifNameSize-1], name)
	*(*uint16)(unsafe.Pointer(&request[ifNameSize])) = iffTUN | iffNoPI | iffVnetHdr
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), tunSetIff, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return -1, fmt.Errorf("%s: %w", name, errno)
	}
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), tunSetOffload, offloadCsum|offloadTSO4|offloadTSO6); errno != 0 {
		return -1, fmt.Errorf("%s: offload: %w", name, errno)
	}
	return fd, nil
}

type delayed struct {
	packet []byte
	due    time.Time
}

func carry(from, to int, delay time.Duration) {
	queue := make(chan delayed, packetsUnderWay)
	go func() {
		runtime.LockOSThread() // it blocks in read(2) for most of its life
		buffer := make([]byte, largest)
		for {
			count, err := syscall.Read(from, buffer)
			switch err {
			case nil:
				queue <- delayed{append([]byte(nil), buffer[:count]...), time.Now().Add(delay)}
			case syscall.EINTR:
			case syscall.EIO, syscall.EBADFD: // not up yet
				time.Sleep(deviceIsDownPoll)
			default:
				fmt.Fprintln(os.Stderr, "link: read:", err)
				os.Exit(1)
			}
		}
	}()
	go func() {
		runtime.LockOSThread() // nanosleep(2) is exact to some 50 microseconds, the runtime's own timers to a millisecond
		for item := range queue {
			if wait := time.Until(item.due); wait > finestNap {
				nap := syscall.NsecToTimespec(wait.Nanoseconds())
				_ = syscall.Nanosleep(&nap, nil)
			}
			_, _ = syscall.Write(to, item.packet) // what a full or missing device refuses is lost, as on any line
		}
	}()
}
