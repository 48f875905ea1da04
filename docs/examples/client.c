/* A client of fdbroker in C, with nothing but libc; written from docs/protocol.md, to be copied.
 *
 *     cc -O2 -o client client.c && ./client [-s] SOCKET PATH...      (-s: the socket is a SOCK_STREAM one)
 *
 * Files go to standard output, errors to standard error. Exit status: 0 all given, 1 not all, 2 no answer. */
#define _GNU_SOURCE
#include <endian.h>
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { HEADER = 12, RESULT = 8, LIMIT = 12, MAX_FRAME = 65536, MAX_PATHS = 253 };
static int sock, on_stream, files[MAX_PATHS], have;          /* the descriptors that came, in their order */
static unsigned char frame[4 + MAX_FRAME + 1], *const body = frame + 4; /* on a stream its length comes first */

static uint32_t get(const unsigned char *at, int bytes) { return bytes ? *at | get(at + 1, bytes - 1) << 8 : 0; }

static void send_frame(size_t size)
{
    uint32_t length = htole32(size);
    memcpy(frame, &length, 4);
    ssize_t all = size + on_stream * 4;
    if (send(sock, on_stream ? frame : body, all, MSG_NOSIGNAL) != all) err(2, "send");
}

/* Receives a part of a stream, or a message of up to so many bytes, with its descriptors; returns the length. */
static size_t receive(unsigned char *to, size_t size)
{
    union { struct cmsghdr head; char space[CMSG_SPACE(sizeof files)]; } control;
    for (size_t at = 0; at < size;) {
        struct iovec part = { to + at, size - at };
        struct msghdr message = { 0, 0, &part, 1, &control, sizeof control, 0 };
        ssize_t got = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
        if (got <= 0) err(2, "no answer");
        if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) errx(2, "a reply that does not fit (see ulimit -n)");
        struct cmsghdr *rights = CMSG_FIRSTHDR(&message);    /* no other kind comes unless it was asked for */
        size_t bytes = rights ? rights->cmsg_len - CMSG_LEN(0) : 0;
        if (bytes > sizeof files - have * sizeof(int)) errx(2, "more descriptors than paths");
        if (rights) memcpy(files + have, CMSG_DATA(rights), bytes);
        have += bytes / sizeof(int);
        if (!on_stream) return got;
        at += got;
    }
    return size;
}

static void receive_frame(unsigned type, size_t expected)
{
    size_t size = MAX_FRAME;
    if (on_stream && (receive(frame, 4), size = get(frame, 4)) > MAX_FRAME) errx(2, "a frame of %zu bytes", size);
    size = receive(body, size);
    size_t text = HEADER + 4 + (body[2] ? LIMIT : 0);        /* of an error, behind which limit it is */
    if (size >= text && body[0] == 0xFF) errx(2, "%.*s", (int)(size - text), (char *)body + text);
    if (size < expected || body[0] != type) errx(2, "another reply than was asked for");
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    if (argc > 1 && !strcmp(argv[1], "-s")) on_stream = 1, argc--, argv++;
    if (argc < 3 || strlen(argv[1]) >= sizeof address.sun_path) errx(2, "usage: client [-s] SOCKET PATH...");
    strcpy(address.sun_path, argv[1]);
    sock = socket(AF_UNIX, (on_stream ? SOCK_STREAM : SOCK_SEQPACKET) | SOCK_CLOEXEC, 0);
    if (sock < 0 || connect(sock, (struct sockaddr *)&address, sizeof address)) err(2, "%s", argv[1]);

    /* The hello tells who sends it also where a super-server has accepted, and no broker has begun yet. */
    if (setsockopt(sock, SOL_SOCKET, SO_PASSCRED, &(int){ 1 }, sizeof(int))) err(2, "SO_PASSCRED");
    memcpy(body, "\1\0\0\0\0\0\0\0\0\0\0\0fdbroker\1\0\1\0\0\0\0", HEADER + 16); /* hello: versions 1 to 1 */
    send_frame(HEADER + 16);
    if (setsockopt(sock, SOL_SOCKET, SO_PASSCRED, &(int){ 0 }, sizeof(int))) err(2, "SO_PASSCRED");
    receive_frame(0x81, HEADER + 24);
    unsigned count = argc - 2;
    if (count > get(body + 20, 2) || count > get(body + 28, 4)) errx(2, "more paths than a request may have");

    memset(body, 0, HEADER);                                 /* open: the paths, joined by NUL */
    body[0] = 0x02, body[2] = count;
    size_t size = HEADER, next = 0;
    for (unsigned i = 0; i < count; size += strlen(argv[2 + i++]) + 1) {
        if (size + strlen(argv[2 + i]) > MAX_FRAME) errx(2, "paths that are too long together");
        strcpy((char *)body + size, argv[2 + i]);
    }
    send_frame(size - 1);
    receive_frame(0x82, HEADER + count * RESULT);

    static char contents[65536];
    int failed = 0;
    for (unsigned i = 0; i < count; i++) {
        const unsigned char *result = body + HEADER + i * RESULT;
        ssize_t got = 0;
        if (result[0] != 0) {                                /* refused or broken: a reason and an errno of Linux */
            warnx("%s: reason %u: %s", argv[2 + i], result[1], strerror(get(result + 2, 2)));
            failed = 1;
            continue;
        }
        if (next == (size_t)have) errx(2, "fewer descriptors than files that were given");
        while ((got = read(files[next], contents, sizeof contents)) > 0)
            if (fwrite(contents, 1, got, stdout) != (size_t)got) err(2, "standard output");
        if (got < 0) warn("%s", argv[2 + i]), failed = 1;
        close(files[next++]);
    }
    if (fflush(stdout)) err(2, "standard output");
    return failed;
}
