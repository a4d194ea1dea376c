// SPDX-License-Identifier: Apache-2.0
// probe socket FAMILY TYPE   prints "ok" or the error's name
// probe open PATH            the same
// probe write BYTES          one write() of that many bytes to stdout
// probe personality NUMBER   prints "ok" or the error's name
// probe uid -                prints the real and the effective user
// probe bind PORT            binds TCP PORT on 127.0.0.1
// probe udp PORT             prints "ready", gives back what UDP PORT is sent
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/socket.h>
#include <unistd.h>

static int say(int result) {
  if (result >= 0) return puts("ok") < 0;
  const char *name = strerrorname_np(errno);
  return puts(name ? name : "?") < 0;
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
  fputs("probe socket|open|write|bind|udp ...\n", stderr);
  return 2;
}
