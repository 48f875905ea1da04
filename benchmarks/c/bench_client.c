/*
 * The client of both brokers: asks for descriptors as fast as it gets them.
 *
 *   bench_client [--cpu N]... [--uid N] [--read] SOCKET LIST BATCH OPENS CONNECTIONS
 *   bench_client [--cpu N]... [--uid N] [--read] --walk START SOCKET
 *
 * LIST holds absolute paths, each ended by a NUL byte. OPENS in all are
 * asked for, BATCH a request, on CONNECTIONS connections with a thread each. Each
 * thread begins at another place of the list and goes round. A connection has
 * one request under way. Descriptors are closed as they come; with --read up
 * to 4 KiB is read from each first.
 *
 * --walk has everything below START handed over in one walk. OPENS are then the
 * descriptors that came, of which the end record must tell as many; and the checksum is the
 * plain sum of the numbers, since the order is the broker's.
 *
 * --cpu may be given more than once: the set of CPUs to run on. --uid is
 * taken on, without groups, before anything is asked.
 *
 * Prints one line of JSON: the seconds between the first request and the last reply,
 * the opens, the CPU seconds of the threads in that time, and a checksum (see
 * use_descriptor). Connecting and one batch that checks what kind of descriptors come are
 * not in the time. Ends with 1 as soon as a path is refused or anything is not as expected.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <grp.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the frames are little-endian and are copied as they lie in memory"
#endif

enum {
	MAX_FRAME = 65536,
	MAX_PATHS = 253,
	MAX_CONNECTIONS = 1024,
	READ_SIZE = 4096,
	TYPE_HELLO = 0x01,
	TYPE_OPEN = 0x02,
	TYPE_WALK = 0x06,
	WALK_LAST = 1,
	REPLY = 0x80,
	TYPE_ERROR = 0xFF,
};

struct header {
	uint8_t type;
	uint8_t flags;
	uint16_t count;
	uint32_t id;
	uint32_t generation;
};

struct hello {
	struct header header;
	char magic[8];
	uint16_t lowest;
	uint16_t highest;
	uint32_t features;
};

struct welcome {
	struct header header;
	uint16_t version;
	uint16_t identity_level;
	uint32_t features;
	uint16_t max_paths;
	uint16_t reserved;
	uint32_t max_frame;
	uint32_t in_flight;
	uint32_t copy_max;
};

struct result {
	uint8_t status;
	uint8_t reason;
	uint16_t error;
	uint32_t length;
};

struct open_reply {
	struct header header;
	struct result results[MAX_PATHS];
};

struct walk {
	struct header header;
	uint32_t credit;
	uint16_t kinds;
	uint16_t options;
	uint64_t least_size;
	uint64_t most_size;
	int64_t newer_than;
} __attribute__((packed));

struct walk_end {
	uint64_t entries;
	uint64_t descriptors;
	uint64_t directories;
	uint32_t incomplete;
} __attribute__((packed));

_Static_assert(sizeof(struct walk) == 44, "walk");
_Static_assert(sizeof(struct walk_end) == 28, "walk_end");
_Static_assert(sizeof(struct header) == 12, "header");
_Static_assert(sizeof(struct hello) == 28, "hello");
_Static_assert(sizeof(struct welcome) == 36, "welcome");
_Static_assert(sizeof(struct result) == 8, "result");
_Static_assert(offsetof(struct open_reply, results) == 12, "results");

struct path {
	const char *bytes;
	size_t length;
};

struct connection {
	pthread_t thread;
	int fd;
	size_t next;       /* place in the list */
	size_t opens;      /* still to be made */
	uint32_t id;       /* of the next request */
	uint64_t position; /* of the next file, for the checksum */
	uint64_t checksum;
	double began, ended; /* by the clock on the wall */
	double cpu;          /* CPU seconds of this thread in between */
};

/* Set in main before the threads start, only read afterwards. */
static struct path *paths;
static size_t path_count;
static size_t batch;
static int read_files;
static pthread_barrier_t start_line;

static void die(const char *what)
{
	fprintf(stderr, "bench_client: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void check(int result, const char *what)
{
	if (result < 0)
		die(what);
}

/* Something came that docs/protocol.md or the arguments do not let come. */
static void unexpected(const char *what)
{
	fprintf(stderr, "bench_client: %s\n", what);
	exit(1);
}

/* pthread functions return the error number. */
static void check_thread(int error, const char *what)
{
	errno = error;
	if (error != 0)
		die(what);
}

static double seconds(clockid_t clock)
{
	struct timespec now;

	check(clock_gettime(clock, &now), "clock_gettime");
	return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* ---- one request ------------------------------------------------------ */

/* Close `fd`; with --read, read it first.
 *
 * Each file of the tree begins with its number, 8 bytes. The checksum is the sum of
 * position * number over everything that a connection was given, so that one wrong file,
 * or two in the wrong order, are seen. */
static void use_descriptor(struct connection *connection, int fd)
{
	if (read_files) {
		char data[READ_SIZE];
		uint64_t number;
		ssize_t size = read(fd, data, sizeof(data));

		check((int)size, "read");
		if (size < (ssize_t)sizeof(number))
			unexpected("a file is shorter than its number");
		memcpy(&number, data, sizeof(number));
		connection->position++;
		connection->checksum += connection->position * number;
	}
	check(close(fd), "close");
}

/* The same work was done for it: a regular file, open for reading only, that blocks. */
static void check_descriptor(int fd)
{
	struct stat facts;
	int flags = fcntl(fd, F_GETFL);

	check(flags, "F_GETFL");
	if ((flags & (O_ACCMODE | O_PATH | O_NONBLOCK)) != O_RDONLY)
		unexpected("a descriptor is not an ordinary one for reading");
	check(fstat(fd, &facts), "fstat");
	if (!S_ISREG(facts.st_mode))
		unexpected("a descriptor is not of a regular file");
}

static size_t build_request(struct connection *connection, char *frame, size_t count)
{
	struct header header = {
		.type = TYPE_OPEN,
		.count = (uint16_t)count,
		.id = connection->id,
	};
	size_t size = sizeof(header);

	memcpy(frame, &header, sizeof(header));
	for (size_t n = 0; n < count; n++) {
		const struct path *path = &paths[(connection->next + n) % path_count];

		if (size + path->length + 1 > MAX_FRAME)
			unexpected("a batch does not fit in a frame");
		/* With its NUL: what separates this path from the next one. */
		memcpy(frame + size, path->bytes, path->length + 1);
		size += path->length + 1;
	}
	return size - 1;
}

static void send_frame(int fd, const void *frame, size_t size)
{
	ssize_t sent = send(fd, frame, size, MSG_NOSIGNAL);

	check((int)sent, "send");
	if ((size_t)sent != size)
		unexpected("a frame was cut in sending");
}

static void check_results(const struct connection *connection, const struct open_reply *reply,
			  size_t count)
{
	for (size_t n = 0; n < count; n++) {
		const struct result *result = &reply->results[n];

		if (result->status == 0)
			continue;
		fprintf(stderr, "bench_client: %s: status %u, reason %u, %s\n",
			paths[(connection->next + n) % path_count].bytes, result->status,
			result->reason, strerror(result->error));
		exit(1);
	}
}

/* Find the descriptors of a message. Returns their number. */
static size_t descriptors_of(struct msghdr *message, int *fds)
{
	size_t n = 0;

	for (struct cmsghdr *entry = CMSG_FIRSTHDR(message); entry != NULL;
	     entry = CMSG_NXTHDR(message, entry)) {
		size_t size = entry->cmsg_len - CMSG_LEN(0);

		if (entry->cmsg_level != SOL_SOCKET || entry->cmsg_type != SCM_RIGHTS)
			continue;
		if (n + size / sizeof(int) > MAX_PATHS)
			unexpected("more descriptors than a message can carry");
		memcpy(fds + n, CMSG_DATA(entry), size);
		n += size / sizeof(int);
	}
	return n;
}

static void exchange(struct connection *connection, size_t count, char *frame, int checking)
{
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int) * MAX_PATHS)];
	} control;
	struct open_reply reply;
	struct iovec part = {.iov_base = &reply, .iov_len = sizeof(reply)};
	struct msghdr message = {
		.msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = control.space,
		.msg_controllen = sizeof(control.space),
	};
	int fds[MAX_PATHS];
	ssize_t size;

	send_frame(connection->fd, frame, build_request(connection, frame, count));
	size = recvmsg(connection->fd, &message, MSG_CMSG_CLOEXEC);
	check((int)size, "recvmsg");
	if (size == 0)
		unexpected("the broker closed the connection");
	if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
		unexpected("a reply was cut (too many descriptors?)");
	if ((size_t)size < sizeof(reply.header))
		unexpected("a reply without a header");
	if (reply.header.type == TYPE_ERROR)
		unexpected("the broker answered with an error frame");
	if (reply.header.type != (TYPE_OPEN | REPLY) || reply.header.id != connection->id ||
	    reply.header.count != count ||
	    (size_t)size != sizeof(reply.header) + count * sizeof(struct result))
		unexpected("a reply that does not match its request");
	check_results(connection, &reply, count);
	if (descriptors_of(&message, fds) != count)
		unexpected("another number of descriptors than of results");
	for (size_t n = 0; n < count; n++) {
		if (checking)
			check_descriptor(fds[n]);
		use_descriptor(connection, fds[n]);
	}
	connection->id++;
	connection->next = (connection->next + count) % path_count;
}

/* ---- a walk ----------------------------------------------------------- */

static size_t walk_below(struct connection *connection, const char *start)
{
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int) * MAX_PATHS)];
	} control;
	static char frame[MAX_FRAME];
	struct walk request = {
		.header = {.type = TYPE_WALK, .count = 0, .id = connection->id},
		.credit = UINT32_MAX,
		.kinds = 1,
		.options = 1,
		.most_size = UINT64_MAX,
		.newer_than = INT64_MIN,
	};
	struct header header;
	struct result result;
	struct walk_end end;
	size_t came = 0, length = strlen(start);

	if (sizeof(request) + length + 1 > sizeof(frame))
		unexpected("START is too long");
	memcpy(frame, &request, sizeof(request));
	memcpy(frame + sizeof(request), start, length + 1);
	connection->began = seconds(CLOCK_MONOTONIC);
	send_frame(connection->fd, frame, sizeof(request) + length + 1);
	do {
		struct iovec part = {.iov_base = frame, .iov_len = sizeof(frame)};
		struct msghdr message = {
			.msg_iov = &part,
			.msg_iovlen = 1,
			.msg_control = control.space,
			.msg_controllen = sizeof(control.space),
		};
		int fds[MAX_PATHS];
		ssize_t size = recvmsg(connection->fd, &message, MSG_CMSG_CLOEXEC);
		size_t count;

		check((int)size, "recvmsg");
		if ((size_t)size < sizeof(header) + sizeof(struct result))
			unexpected("the broker closed the connection, or sent half a frame");
		if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
			unexpected("a frame was cut (too many descriptors?)");
		memcpy(&header, frame, sizeof(header));
		if (header.type != (TYPE_WALK | REPLY) || header.id != connection->id)
			unexpected("a frame that is of no walk");
		memcpy(&result, frame + sizeof(header), sizeof(result));
		if (result.status != 0) {
			fprintf(stderr, "bench_client: %s: status %u, reason %u, %s\n", start,
				result.status, result.reason, strerror(result.error));
			exit(1);
		}
		count = descriptors_of(&message, fds);
		if (count != header.count)
			unexpected("another number of descriptors than of entries");
		if (came == 0 && count > 0)
			check_descriptor(fds[0]);
		for (size_t n = 0; n < count; n++) {
			connection->position = 0;
			use_descriptor(connection, fds[n]);
		}
		came += count;
		if (header.flags & WALK_LAST)
			memcpy(&end, frame + size - sizeof(end), sizeof(end));
	} while (!(header.flags & WALK_LAST));
	connection->ended = seconds(CLOCK_MONOTONIC);
	if (end.descriptors != came || end.incomplete != 0)
		unexpected("the end of the walk does not tell what came");
	return came;
}

/* ---- one connection --------------------------------------------------- */

static void connect_to(struct connection *connection, const struct sockaddr_un *address)
{
	struct hello hello = {
		.header = {.type = TYPE_HELLO, .id = 1},
		.magic = {'f', 'd', 'b', 'r', 'o', 'k', 'e', 'r'},
		.lowest = 1,
		.highest = 1,
	};
	struct welcome welcome;
	ssize_t size;
	int fd;

	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	check(fd, "socket");
	check(connect(fd, (const struct sockaddr *)address, sizeof(*address)), address->sun_path);
	send_frame(fd, &hello, sizeof(hello));
	size = recv(fd, &welcome, sizeof(welcome), 0);
	check((int)size, "recv");
	if (size != sizeof(welcome) || welcome.header.type != (TYPE_HELLO | REPLY) ||
	    welcome.header.id != 1 || welcome.version != 1)
		unexpected("the first reply is no welcome");
	if (batch > welcome.max_paths || batch > welcome.in_flight)
		unexpected("BATCH is more than the broker allows");
	connection->fd = fd;
	connection->id = 2;
}

static void *run(void *argument)
{
	struct connection *connection = argument;
	size_t first = connection->next;
	char *frame = malloc(MAX_FRAME);
	int waited;

	if (frame == NULL)
		die("malloc");
	exchange(connection, batch, frame, 1);
	connection->next = first;
	connection->position = 0;
	connection->checksum = 0;

	waited = pthread_barrier_wait(&start_line);
	if (waited != PTHREAD_BARRIER_SERIAL_THREAD)
		check_thread(waited, "pthread_barrier_wait");
	/* Each thread reads the clock itself: on one CPU a thread that only watches may be
	 * woken long after the others have begun. */
	connection->began = seconds(CLOCK_MONOTONIC);
	connection->cpu = seconds(CLOCK_THREAD_CPUTIME_ID);
	while (connection->opens > 0) {
		size_t count = connection->opens < batch ? connection->opens : batch;

		exchange(connection, count, frame, 0);
		connection->opens -= count;
	}
	connection->ended = seconds(CLOCK_MONOTONIC);
	connection->cpu = seconds(CLOCK_THREAD_CPUTIME_ID) - connection->cpu;
	free(frame);
	check(close(connection->fd), "close");
	return NULL;
}

/* ---- start ------------------------------------------------------------ */

static unsigned long number(const char *text, unsigned long least, unsigned long most)
{
	char *rest;
	unsigned long value;

	errno = 0;
	value = strtoul(text, &rest, 10);
	if (errno != 0 || *text == '\0' || *rest != '\0' || value < least || value > most) {
		fprintf(stderr, "bench_client: not a number from %lu to %lu: %s\n", least, most,
			text);
		exit(2);
	}
	return value;
}

/* Read the whole list and note where each path begins. */
static void load_list(const char *name)
{
	struct stat facts;
	char *text;
	size_t size, done = 0;
	int fd = open(name, O_RDONLY | O_CLOEXEC);

	check(fd, name);
	check(fstat(fd, &facts), "fstat");
	size = (size_t)facts.st_size;
	text = malloc(size + 1);
	if (text == NULL)
		die("malloc");
	while (done < size) {
		ssize_t got = read(fd, text + done, size - done);

		check((int)got, "read");
		if (got == 0)
			break;
		done += (size_t)got;
	}
	check(close(fd), "close");
	if (done == 0 || text[done - 1] != '\0')
		unexpected("LIST must hold paths, each ended by a NUL");
	for (size_t at = 0; at < done; at++)
		path_count += text[at] == '\0';
	paths = calloc(path_count, sizeof(*paths));
	if (paths == NULL)
		die("calloc");
	for (size_t n = 0, at = 0; n < path_count; n++) {
		paths[n].bytes = text + at;
		paths[n].length = strlen(text + at);
		at += paths[n].length + 1;
	}
}

static void become(uid_t uid)
{
	check(setgroups(0, NULL), "setgroups");
	check(setresgid(uid, uid, uid), "setresgid");
	check(setresuid(uid, uid, uid), "setresuid");
}

/* A reply for which there are not enough free descriptors would be cut. */
static void raise_descriptor_limit(void)
{
	struct rlimit limit;

	check(getrlimit(RLIMIT_NOFILE, &limit), "getrlimit");
	limit.rlim_cur = limit.rlim_max;
	check(setrlimit(RLIMIT_NOFILE, &limit), "setrlimit");
}

static void usage(void)
{
	fprintf(stderr, "usage: bench_client [--cpu N]... [--uid N] [--read] "
			"SOCKET LIST BATCH OPENS CONNECTIONS, or --walk START SOCKET\n");
	exit(2);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{"cpu", required_argument, NULL, 'c'},
		{"uid", required_argument, NULL, 'u'},
		{"read", no_argument, NULL, 'r'},
		{"walk", required_argument, NULL, 'w'},
		{NULL, 0, NULL, 0},
	};
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct connection *connections;
	size_t opens, count;
	uint64_t checksum = 0;
	double began = 0, ended = 0, cpu = 0;
	cpu_set_t cpus;
	int option;
	unsigned long uid = 0;
	const char *start = NULL;

	CPU_ZERO(&cpus);
	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 'c')
			CPU_SET(number(optarg, 0, CPU_SETSIZE - 1), &cpus);
		else if (option == 'u')
			uid = number(optarg, 1, UINT32_MAX - 1);
		else if (option == 'r')
			read_files = 1;
		else if (option == 'w')
			start = optarg;
		else
			usage();
	}
	if (argc - optind != (start == NULL ? 5 : 1))
		usage();
	if (strlen(argv[optind]) >= sizeof(address.sun_path))
		unexpected("SOCKET is too long");
	memcpy(address.sun_path, argv[optind], strlen(argv[optind]) + 1);
	if (start == NULL) {
		batch = number(argv[optind + 2], 1, MAX_PATHS);
		count = number(argv[optind + 4], 1, MAX_CONNECTIONS);
		opens = number(argv[optind + 3], count, UINT32_MAX);
		load_list(argv[optind + 1]);
	} else {
		batch = count = 1;
		opens = 0;
	}
	raise_descriptor_limit();
	if (CPU_COUNT(&cpus) > 0)
		check(sched_setaffinity(0, sizeof(cpus), &cpus), "sched_setaffinity");
	if (uid != 0)
		become((uid_t)uid);

	connections = calloc(count, sizeof(*connections));
	if (connections == NULL)
		die("calloc");
	check_thread(pthread_barrier_init(&start_line, NULL, (unsigned int)count),
		     "pthread_barrier_init");
	if (start != NULL) {
		connect_to(&connections[0], &address);
		opens = walk_below(&connections[0], start);
		check(close(connections[0].fd), "close");
	}
	for (size_t n = 0; n < count && start == NULL; n++) {
		connections[n].opens = opens / count + (n < opens % count);
		connections[n].next = n * (path_count / count) % path_count;
		connect_to(&connections[n], &address);
		check_thread(pthread_create(&connections[n].thread, NULL, run, &connections[n]),
			     "pthread_create");
	}
	for (size_t n = 0; n < count; n++) {
		const struct connection *connection = &connections[n];

		if (start == NULL)
			check_thread(pthread_join(connection->thread, NULL), "pthread_join");
		checksum += connection->checksum;
		cpu += connection->cpu;
		if (n == 0 || connection->began < began)
			began = connection->began;
		if (n == 0 || connection->ended > ended)
			ended = connection->ended;
	}

	if (printf("{\"seconds\": %.9f, \"opens\": %zu, \"cpu_seconds\": %.9f, "
		   "\"checksum\": %llu}\n",
		   ended - began, opens, cpu, (unsigned long long)checksum) < 0 ||
	    fflush(stdout) != 0)
		die("standard output");
	free(connections);
	return 0;
}
