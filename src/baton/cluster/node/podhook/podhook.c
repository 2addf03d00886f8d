/* Preloaded into every dynamically linked program of a pod: "all addresses" means the pod's own (BATON_POD_IP), and, in plain
 * isolation, the cluster's names are looked up in the slot's hosts file (BATON_HOSTS_FILE) first.
 *
 * The counterpart of pyhook for libraries that bind and resolve in C (Mooncake, gRPC, ...). Without it they would take a port
 * from all pods of the machine and listen to its network. Streams only: a datagram socket that binds to all addresses usually
 * only wants a port to send from. Of a name with several addresses a program gets the first. Not reached: static programs
 * and those that call the kernel themselves (Go), gethostbyname.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
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

/* The first address of a name in the hosts file; 0 when it is not there. */
static int look_up(const char *name, char address[INET6_ADDRSTRLEN]) {
    const char *path = getenv("BATON_HOSTS_FILE");
    FILE *file = path == NULL ? NULL : fopen(path, "re");
    char *line = NULL;
    size_t capacity = 0;
    int found = 0;
    if (file == NULL)
        return 0;
    while (!found && getline(&line, &capacity, file) > 0) {
        char *rest = NULL, *first, *word;
        line[strcspn(line, "#\n")] = '\0';
        first = strtok_r(line, " \t", &rest);
        while (first != NULL && !found && (word = strtok_r(NULL, " \t", &rest)) != NULL)
            found = strcasecmp(word, name) == 0;
        if (found)
            found = snprintf(address, INET6_ADDRSTRLEN, "%s", first) < INET6_ADDRSTRLEN;
    }
    free(line);
    fclose(file);
    return found;
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **result) {
    static int (*next)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    char address[INET6_ADDRSTRLEN];
    if (next == NULL)
        *(void **)&next = dlsym(RTLD_NEXT, "getaddrinfo");
    return next(node != NULL && look_up(node, address) ? address : node, service, hints, result);
}
