// SPDX-License-Identifier: Apache-2.0
// probe socket FAMILY TYPE   prints "ok" or the error's name
// probe open PATH            the same
// probe write BYTES          one write() of that many bytes to stdout
// probe personality NUMBER   prints "ok" or the error's name
// probe uid -                prints the real and the effective user
// probe bind PORT            binds TCP PORT on 127.0.0.1
// probe udp PORT             prints "ready", gives back what UDP PORT is sent
// probe vsock -              makes an AF_VSOCK socket in each way there is: its name, and as above, or a signal's name
// probe vsock stay           the same, and stays
// probe dial CID PORT        connects there by AF_VSOCK: prints "ok" or the error's name
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/vm_sockets.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int say(int result) {
  if (result >= 0) return puts("ok") < 0;
  const char *name = strerrorname_np(errno);
  return puts(name ? name : "?") < 0;
}

static int by_socket(void) { return socket(AF_VSOCK, SOCK_STREAM, 0); }

static int by_socketpair(void) {
  int pair[2];
  return socketpair(AF_VSOCK, SOCK_STREAM, 0, pair);
}

// Whoever has a ring makes sockets with it, past any filter.
static int by_io_uring(void) {
  struct io_uring_params params = {0};
  return syscall(SYS_io_uring_setup, 4, &params);
}

// socket() as a program of 32 bits calls it.
static int by_int80(void) {
  int result;
  __asm__ volatile("int $0x80" : "=a"(result) : "a"(359), "b"(AF_VSOCK), "c"(SOCK_STREAM), "d"(0) : "memory");
  if (result < 0) errno = -result;
  return result;
}

// And as one of the x32 ABI does.
static int by_x32(void) { return syscall(0x40000000 | SYS_socket, AF_VSOCK, SOCK_STREAM, 0); }

// In a process of its own, which it may be the end of.
static void try_to_open(const char *way, int (*open_it)(void)) {
  int status;
  printf("%s ", way);
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    say(open_it());
    fflush(stdout);
    _exit(0);
  }
  if (child < 0 || waitpid(child, &status, 0) < 0) puts("?");
  else if (WIFSIGNALED(status)) printf("SIG%s\n", sigabbrev_np(WTERMSIG(status)));
}

static int dial(unsigned cid, unsigned port) {
  struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
  int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
  return fd < 0 ? fd : connect(fd, (struct sockaddr *)&at, sizeof at);
}

int main(int argc, char **argv) {
  const char *what = argc > 2 ? argv[1] : "";
  if (!strcmp(what, "socket"))
    return say(socket(atoi(argv[2]), argc > 3 ? atoi(argv[3]) : SOCK_STREAM, 0));
  if (!strcmp(what, "personality")) return say(personality(strtoul(argv[2], 0, 0)));
  if (!strcmp(what, "uid")) return printf("%d %d\n", getuid(), geteuid()) < 0;
  if (!strcmp(what, "open")) return say(open(argv[2], O_RDONLY | O_NONBLOCK));
  if (!strcmp(what, "write")) {
    size_t size = strtoul(argv[2], 0, 10);
    char *bytes = malloc(size);
    if (!bytes) return 1;
    for (size_t i = 0; i < size; i++) bytes[i] = (char)('a' + i % 23);
    ssize_t wrote = write(1, bytes, size);
    fprintf(stderr, "%zd\n", wrote);
    return 0;
  }
  if (!strcmp(what, "bind")) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    return say(fd < 0 ? fd : bind(fd, (struct sockaddr *)&at, sizeof at));
  }
  if (!strcmp(what, "udp")) {
    struct sockaddr_in6 from, at = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(argv[2]))};
    int fd = socket(AF_INET6, SOCK_DGRAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof at)) return say(-1);
    puts("ready");
    fflush(stdout);
    for (;;) {
      static char bytes[65536];
      socklen_t size = sizeof from;
      ssize_t got = recvfrom(fd, bytes, sizeof bytes, 0, (struct sockaddr *)&from, &size);
      if (got < 0 || sendto(fd, bytes, got, 0, (struct sockaddr *)&from, size) != got) return say(-1);
    }
  }
  if (!strcmp(what, "vsock")) {
    try_to_open("socket", by_socket);
    try_to_open("socketpair", by_socketpair);
    try_to_open("io_uring", by_io_uring);
    try_to_open("int80", by_int80);
    try_to_open("x32", by_x32);
    puts("end");
    fflush(stdout);
    while (!strcmp(argv[2], "stay")) pause();
    return 0;
  }
  if (!strcmp(what, "dial")) return say(dial(strtoul(argv[2], 0, 0), argc > 3 ? strtoul(argv[3], 0, 0) : 0));
  fputs("probe socket|open|write|bind|udp|vsock|dial ...\n", stderr);
  return 2;
}
