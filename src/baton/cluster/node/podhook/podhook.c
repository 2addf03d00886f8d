/* Preloaded into every dynamically linked program of a pod: "all addresses" means the pod's own (BATON_POD_IP).
 *
 * The counterpart of pyhook for libraries that bind in C and take no address (Mooncake, gRPC, ...). Without it they would take
 * a port from all pods of the machine and listen to its network. Streams only: a datagram socket that binds to all addresses
 * usually only wants a port to send from. Not reached: static programs and those that call the kernel themselves (Go).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static int option(int fd, int level, int name) {
    int value = 0;
    socklen_t length = sizeof value;
    return getsockopt(fd, level, name, &value, &length) == 0 ? value : -1;
}

int bind(int fd, const struct sockaddr *address, socklen_t length) {
    struct sockaddr_in6 own;
    const char *text = getenv("BATON_POD_IP");
    struct in_addr pod;
    if (address == NULL || length > sizeof own || text == NULL || inet_pton(AF_INET, text, &pod) != 1 ||
        option(fd, SOL_SOCKET, SO_TYPE) != SOCK_STREAM)
        return (int)syscall(SYS_bind, fd, address, length);
    memcpy(&own, address, length);
    if (address->sa_family == AF_INET && length >= sizeof(struct sockaddr_in)) {
        struct sockaddr_in *four = (struct sockaddr_in *)&own;
        if (four->sin_addr.s_addr == htonl(INADDR_ANY))
            four->sin_addr = pod;
    } else if (address->sa_family == AF_INET6 && length == sizeof own) {
        if (IN6_IS_ADDR_UNSPECIFIED(&own.sin6_addr) && option(fd, IPPROTO_IPV6, IPV6_V6ONLY) == 0) {
            own.sin6_addr.s6_addr[10] = own.sin6_addr.s6_addr[11] = 0xff; /* the IPv4 address, mapped */
            memcpy(&own.sin6_addr.s6_addr[12], &pod, sizeof pod);
        }
    }
    return (int)syscall(SYS_bind, fd, (const struct sockaddr *)&own, length);
}
