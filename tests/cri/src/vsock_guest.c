// SPDX-License-Identifier: Apache-2.0
// /init of a guest that is a kernel and this program. Each connection to its port asks for one thing, in a line:
//   echo              what comes, until its end
//   send BYTES CHUNK  that many bytes, in writes of CHUNK, and stays
//   sink BYTES        reads that many and says how many it got
//   turn BYTES        reads to the end, then sends that many, and ends
//   half BYTES        sends that many, ends its own direction, and reads to the end of the other
//   deaf BYTES        ends the other direction, sends that many, and stays
//   hold              says "." and stays, reading nothing
//   leave             says "." and, once there is something to read, ends without reading it
//   die               says "." and is killed
//   dial CID PORT     connects there and says "ok" or the error's name
//   count             says how many bytes a send has sent, or a turn or half read, when it has
//   reboot            restarts the guest
#define _GNU_SOURCE
#include <errno.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PORT = 5000 };
static char buffer[1 << 20];
static int counts[2];

static struct sockaddr_vm address(unsigned cid, unsigned port) {
  struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
  return at;
}

static void send_all(int fd, long bytes, long chunk) {
  while (bytes > 0) {
    ssize_t sent = write(fd, buffer, bytes < chunk ? bytes : chunk);
    if (sent < 0) _exit(1);
    bytes -= sent;
  }
}

static void say(int fd, const char *text) { (void)!write(fd, text, strlen(text)); }

// For who asks for the count.
static void tell(long count) { (void)!write(counts[1], &count, sizeof count); }

// Reads to the end, or `most` bytes.
static long read_all(int fd, long most) {
  long sum = 0;
  while (sum < most) {
    ssize_t got = read(fd, buffer, most - sum < (long)sizeof buffer ? most - sum : (long)sizeof buffer);
    if (got <= 0) break;
    sum += got;
  }
  return sum;
}

static void stay(void) {
  for (;;) pause();
}

static void dial(int fd, unsigned cid, unsigned port) {
  struct sockaddr_vm at = address(cid, port);
  int to = socket(AF_VSOCK, SOCK_STREAM, 0);
  int failed = to < 0 || connect(to, (struct sockaddr *)&at, sizeof at) < 0;
  say(fd, failed ? strerrorname_np(errno) : "ok");
}

static void serve(int fd) {
  char line[64] = "", what[16] = "";
  long first = 0, second = 0;
  // Byte by byte: what follows the line is for what it asks for.
  for (size_t at = 0; at < sizeof line - 1 && read(fd, line + at, 1) == 1 && line[at] != '\n'; at++) {}
  sscanf(line, "%15s %ld %ld", what, &first, &second);
  if (!strcmp(what, "echo")) {
    for (ssize_t got; (got = read(fd, buffer, sizeof buffer)) > 0;) send_all(fd, got, got);
  } else if (!strcmp(what, "send")) {
    send_all(fd, first, second);
    tell(first);
    stay();
  } else if (!strcmp(what, "sink")) {
    sprintf(line, "%ld", read_all(fd, first));
    say(fd, line);
  } else if (!strcmp(what, "turn")) {
    tell(read_all(fd, 1L << 40));
    send_all(fd, first, first);
  } else if (!strcmp(what, "half")) {
    send_all(fd, first, first);
    shutdown(fd, SHUT_WR);
    tell(read_all(fd, 1L << 40));
  } else if (!strcmp(what, "deaf")) {
    shutdown(fd, SHUT_RD);
    send_all(fd, first, first);
    stay();
  } else if (!strcmp(what, "hold")) {
    say(fd, ".");
    stay();
  } else if (!strcmp(what, "leave")) {
    struct pollfd unread = {.fd = fd, .events = POLLIN};
    say(fd, ".");
    poll(&unread, 1, -1);
  } else if (!strcmp(what, "die")) {
    say(fd, ".");
    raise(SIGKILL);
  } else if (!strcmp(what, "dial")) {
    dial(fd, first, second);
  } else if (!strcmp(what, "count")) {
    (void)!read(counts[0], &first, sizeof first);
    sprintf(line, "%ld", first);
    say(fd, line);
  } else if (!strcmp(what, "reboot")) {
    reboot(RB_AUTOBOOT);
  }
}

int main(void) {
  struct sockaddr_vm at = address(VMADDR_CID_ANY, PORT);
  int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
  signal(SIGCHLD, SIG_IGN);
  signal(SIGPIPE, SIG_IGN);
  for (size_t i = 0; i < sizeof buffer; i++) buffer[i] = (char)('a' + i % 23);
  if (pipe(counts) || bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 16)) return 1;
  for (;;) {
    int fd = accept(listener, 0, 0);
    if (fd >= 0 && fork() == 0) {
      close(listener);
      serve(fd);
      _exit(0);
    }
    close(fd);
  }
}
