/*
 * The floor: what the same opens cost when the broker is as small as C lets it be.
 *
 *   floor_broker SOCKET ROOT UID
 *
 * It speaks hello, open and walk of docs/protocol.md on a SOCK_SEQPACKET socket,
 * one blocking thread per connection. For each path it makes the system calls
 * that fdbroker makes, in the same safe order, under the same kind of
 * confinement: an ordinary uid, CAP_DAC_READ_SEARCH alone, no_new_privs, a
 * Landlock domain of one root, a seccomp allow-list.
 *
 * A walk is one of the whole root that opens every regular file; its filters are not
 * looked at, and credit is a socket's buffer.
 *
 * What it leaves out is what fdbroker is for: no policy, no question who is
 * calling, no audit. EVERYBODY who can connect reads everything beneath ROOT.
 * It exists to be measured against and must never be installed.
 *
 * Prints "ready" on standard output when connections are accepted.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/openat2.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the frames are little-endian and are copied as they lie in memory"
#endif

#if defined(__x86_64__)
#define THIS_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define THIS_ARCH AUDIT_ARCH_AARCH64
#else
#error "only x86_64 and aarch64"
#endif

enum {
	MAX_FRAME = 65536,
	MAX_PATHS = 253,
	MAX_PATH_BYTES = 4095,
	SEND_BUFFER = 32768,
	THREAD_STACK = 256 * 1024,
	BACKLOG = 128,
	WALK_BATCH = 250,
	MAX_DEPTH = 64,
	DIRECTORY_CHUNK = 32768,
	MAX_REPLY = 32768,
};

enum {
	TYPE_HELLO = 0x01,
	TYPE_OPEN = 0x02,
	TYPE_WALK = 0x06,
	REPLY = 0x80,
	WALK_LAST = 1,
	WALK_HAS_DESCRIPTOR = 1,
};

enum {
	GIVEN = 0,
	REFUSED = 1,
	BROKEN = 2,
};

enum {
	REASON_DENIED = 1,
	REASON_PATH_INVALID = 2,
	REASON_NOT_FOUND = 3,
	REASON_NOT_DIRECTORY = 4,
	REASON_NOT_REGULAR = 5,
	REASON_SYMLINK = 6,
	REASON_CROSSES_MOUNT = 7,
	REASON_BUSY = 10,
	REASON_BROKEN = 14,
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

struct moment {
	int64_t seconds;
	uint32_t nanoseconds;
	uint32_t spare;
};

struct walk_entry {
	uint16_t length;
	uint8_t type;
	uint8_t flags;
	uint32_t links;
	uint32_t uid;
	uint32_t gid;
	uint16_t mode;
	uint16_t spare;
	uint64_t inode;
	uint64_t size;
	struct moment ctime;
	struct moment mtime;
	uint32_t more_spare[2];
	uint32_t device_major;
	uint32_t device_minor;
} __attribute__((packed));

struct walk_end {
	uint64_t entries;
	uint64_t descriptors;
	uint64_t directories;
	uint32_t incomplete;
} __attribute__((packed));

/* The layouts above go over the wire: no padding may creep in. */
_Static_assert(sizeof(struct walk) == 44, "walk");
_Static_assert(sizeof(struct walk_entry) == 84, "walk_entry");
_Static_assert(sizeof(struct walk_end) == 28, "walk_end");
_Static_assert(sizeof(struct header) == 12, "header");
_Static_assert(sizeof(struct hello) == 28, "hello");
_Static_assert(sizeof(struct welcome) == 36, "welcome");
_Static_assert(sizeof(struct result) == 8, "result");
_Static_assert(offsetof(struct open_reply, results) == 12, "results");

/* Set once in main, read by every thread afterwards. */
static int root_fd;
static int proc_fd;
static const char *root_path;
static size_t root_length;

static void die(const char *what)
{
	fprintf(stderr, "floor_broker: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void check(int result, const char *what)
{
	if (result < 0)
		die(what);
}

/* Closing must not fail: a descriptor that stays would be counted as ours. */
static void close_checked(int fd)
{
	check(close(fd), "close");
}

/* ---- one path --------------------------------------------------------- */

static struct result failed(uint8_t status, uint8_t reason, int error)
{
	struct result result = {.status = status, .reason = reason, .error = (uint16_t)error};
	return result;
}

static struct result from_errno(int error)
{
	switch (error) {
	case EACCES:
	case EPERM:
		return failed(REFUSED, REASON_DENIED, EACCES);
	case ENOENT:
		return failed(REFUSED, REASON_NOT_FOUND, error);
	case ENOTDIR:
		return failed(REFUSED, REASON_NOT_DIRECTORY, error);
	case ELOOP:
		return failed(REFUSED, REASON_SYMLINK, error);
	case EXDEV:
		return failed(REFUSED, REASON_CROSSES_MOUNT, error);
	case EAGAIN:
		return failed(REFUSED, REASON_BUSY, error);
	default:
		return failed(BROKEN, REASON_BROKEN, error);
	}
}

/* Open the object behind `held` (O_PATH) for reading, and say what it is. */
static struct result reopen(int held, struct stat *facts, int *out)
{
	char name[12];
	int fd, flags;

	if (fstat(held, facts) < 0)
		return from_errno(errno);
	if (!S_ISREG(facts->st_mode))
		return failed(REFUSED, REASON_NOT_REGULAR,
			      S_ISDIR(facts->st_mode) ? EISDIR : EINVAL);

	/* The number only, looked up in a held directory: a full
	 * "/proc/self/fd/N" would be resolved anew for each file. */
	if (snprintf(name, sizeof(name), "%d", held) < 0)
		return failed(BROKEN, REASON_BROKEN, EIO);
	fd = openat(proc_fd, name, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	if (fd < 0)
		return from_errno(errno);

	/* What F_GETFL would answer is known, so it is not asked: O_NONBLOCK is the
	 * only flag of ours that F_SETFL can change. */
	flags = O_RDONLY;
	if (fcntl(fd, F_SETFL, flags) < 0) {
		int error = errno;
		close_checked(fd);
		return from_errno(error);
	}
	*out = fd;
	return failed(GIVEN, 0, 0);
}

/* Serve one path, absolute and ended by a NUL. */
static struct result serve_path(const char *path, size_t length, int *out)
{
	struct open_how how = {
		.flags = O_PATH | O_CLOEXEC,
		.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS |
			   RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV,
	};
	struct result result;
	struct stat facts;
	int held;

	if (length == 0 || length > MAX_PATH_BYTES || path[0] != '/')
		return failed(REFUSED, REASON_PATH_INVALID, EINVAL);
	if (length <= root_length + 1 || memcmp(path, root_path, root_length) != 0 ||
	    path[root_length] != '/')
		return failed(REFUSED, REASON_DENIED, EACCES);

	held = (int)syscall(SYS_openat2, root_fd, path + root_length + 1, &how, sizeof(how));
	if (held < 0)
		return from_errno(errno);
	result = reopen(held, &facts, out);
	close_checked(held);
	return result;
}

/* ---- one connection --------------------------------------------------- */

/* Send a reply with `n` descriptors; false when the client has gone. */
static int send_reply(int client, const void *data, size_t size, const int *fds, size_t n)
{
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int) * MAX_PATHS)];
	} control;
	struct iovec part = {.iov_base = (void *)data, .iov_len = size};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

	if (n > 0) {
		struct cmsghdr *entry;

		message.msg_control = control.space;
		message.msg_controllen = CMSG_SPACE(sizeof(int) * n);
		entry = CMSG_FIRSTHDR(&message);
		entry->cmsg_level = SOL_SOCKET;
		entry->cmsg_type = SCM_RIGHTS;
		entry->cmsg_len = CMSG_LEN(sizeof(int) * n);
		memcpy(CMSG_DATA(entry), fds, sizeof(int) * n);
	}
	if (sendmsg(client, &message, MSG_NOSIGNAL) == (ssize_t)size)
		return 1;
	if (errno != EPIPE && errno != ECONNRESET)
		die("sendmsg");
	return 0;
}

static int serve_hello(int client, const char *frame, size_t size)
{
	struct hello hello;
	struct welcome welcome = {
		.header = {.type = TYPE_HELLO | REPLY},
		.version = 1,
		.max_paths = MAX_PATHS,
		.max_frame = MAX_FRAME,
		.in_flight = MAX_PATHS,
	};

	if (size != sizeof(hello))
		return 0;
	memcpy(&hello, frame, sizeof(hello));
	if (hello.header.type != TYPE_HELLO || hello.header.flags != 0 ||
	    hello.header.count != 0 || memcmp(hello.magic, "fdbroker", 8) != 0 ||
	    hello.lowest > 1 || hello.highest < 1)
		return 0;
	welcome.header.id = hello.header.id;
	return send_reply(client, &welcome, sizeof(welcome), NULL, 0);
}

/* `frame` has room for one byte more than `size`: the NUL of the last path. */
static int serve_open(int client, char *frame, size_t size)
{
	struct open_reply reply = {.header = {.type = TYPE_OPEN | REPLY}};
	struct header header;
	int fds[MAX_PATHS];
	size_t given = 0, n;
	char *path = frame + sizeof(header), *end = frame + size;
	int alive;

	if (size < sizeof(header))
		return 0;
	memcpy(&header, frame, sizeof(header));
	if (header.type != TYPE_OPEN || header.flags != 0 || header.generation != 0 ||
	    header.count == 0 || header.count > MAX_PATHS)
		return 0;
	reply.header.count = header.count;
	reply.header.id = header.id;
	*end = '\0';

	for (n = 0; n < header.count; n++) {
		size_t length;

		/* Fewer paths than the header said: malformed. */
		if (path > end)
			break;
		length = strlen(path);
		reply.results[n] = serve_path(path, length, &fds[given]);
		if (reply.results[n].status == GIVEN)
			given++;
		path += length + 1;
	}
	if (n == header.count && path == end + 1)
		alive = send_reply(client, &reply,
				   sizeof(header) + n * sizeof(struct result), fds, given);
	else
		alive = 0;
	for (n = 0; n < given; n++)
		close_checked(fds[n]);
	return alive;
}

/* ---- a walk ----------------------------------------------------------- */

/* A directory that is read. Its path is the first `length` bytes of the walk's. Between two
 * frames it is not held: fdbroker does not do so either. */
struct level {
	int fd;    /* O_PATH until it is read, -1 between two frames */
	int reads;
	int64_t position; /* behind the last entry that was looked at */
	size_t length;
	struct stat facts; /* as it was opened */
	char *chunk;
	long size, at;
	int in_batch;
};

/* What a frame holds so far. */
struct walk_batch {
	char frame[MAX_REPLY];
	size_t size;
	uint16_t count;
	int fds[WALK_BATCH];
	/* Directories that were read to their end in this batch, still to be looked at again. */
	struct level left[WALK_BATCH];
	char left_paths[WALK_BATCH][MAX_PATH_BYTES + 1];
	size_t left_count;
	struct walk_end end;
};

struct dirent64 {
	uint64_t inode;
	int64_t next;
	unsigned short length;
	unsigned char type;
	char name[];
};

static const struct open_how beneath = {
	.flags = O_PATH | O_NOFOLLOW | O_CLOEXEC,
	.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV,
};

static int64_t nanoseconds(struct timespec time)
{
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static struct moment moment(struct timespec time)
{
	return (struct moment){.seconds = time.tv_sec, .nanoseconds = (uint32_t)time.tv_nsec};
}

/* A directory must be where it was, and untouched. This one gives up otherwise, which
 * would be no way to serve anybody. */
static void look_again(const struct level *level, const char *path)
{
	struct stat now;
	int again = (int)syscall(SYS_openat2, root_fd, level->length == 0 ? "." : path, &beneath,
				 sizeof(beneath));

	check(again, "openat2");
	check(fstat(again, &now), "fstat");
	close_checked(again);
	if (now.st_dev != level->facts.st_dev || now.st_ino != level->facts.st_ino ||
	    nanoseconds(now.st_mtim) != nanoseconds(level->facts.st_mtim) ||
	    nanoseconds(now.st_ctim) != nanoseconds(level->facts.st_ctim)) {
		fprintf(stderr, "floor_broker: the tree changes\n");
		exit(1);
	}
}

static int send_batch(int client, struct walk_batch *batch, struct level *levels, size_t depth,
		      const char *path, uint32_t id, int last)
{
	struct header header = {
		.type = TYPE_WALK | REPLY,
		.flags = last ? WALK_LAST : 0,
		.count = batch->count,
		.id = id,
	};
	char name[MAX_PATH_BYTES + 1];
	int alive;

	for (size_t n = 0; n < depth; n++) {
		if (!levels[n].in_batch)
			continue;
		memcpy(name, path, levels[n].length);
		name[levels[n].length] = '\0';
		look_again(&levels[n], name);
		levels[n].in_batch = 0;
		close_checked(levels[n].fd);
		levels[n].fd = -1;
	}
	for (size_t n = 0; n < batch->left_count; n++)
		look_again(&batch->left[n], batch->left_paths[n]);
	batch->left_count = 0;
	memcpy(batch->frame, &header, sizeof(header));
	if (last) {
		memcpy(batch->frame + batch->size, &batch->end, sizeof(batch->end));
		batch->size += sizeof(batch->end);
	}
	alive = send_reply(client, batch->frame, batch->size, batch->fds, batch->count);
	for (size_t n = 0; n < batch->count; n++)
		close_checked(batch->fds[n]);
	batch->count = 0;
	batch->size = sizeof(header) + sizeof(struct result);
	return alive;
}

/* Add a regular file; what is none is left out. */
static void add_file(struct walk_batch *batch, int directory, const char *name, const char *path,
		     size_t length)
{
	struct walk_entry entry = {.length = (uint16_t)length, .type = 8, .flags = 1};
	struct stat facts;
	int held = (int)syscall(SYS_openat2, directory, name, &beneath, sizeof(beneath));

	check(held, "openat2");
	if (reopen(held, &facts, &batch->fds[batch->count]).status == GIVEN) {
		entry.links = (uint32_t)facts.st_nlink;
		entry.uid = facts.st_uid;
		entry.gid = facts.st_gid;
		entry.mode = (uint16_t)facts.st_mode;
		entry.inode = facts.st_ino;
		entry.size = (uint64_t)facts.st_size;
		entry.ctime = moment(facts.st_ctim);
		entry.mtime = moment(facts.st_mtim);
		entry.device_major = major(facts.st_dev);
		entry.device_minor = minor(facts.st_dev);
		memcpy(batch->frame + batch->size, &entry, sizeof(entry));
		memcpy(batch->frame + batch->size + sizeof(entry), path, length);
		batch->size += sizeof(entry) + length;
		batch->count++;
		batch->end.entries++;
		batch->end.descriptors++;
	}
	close_checked(held);
}

static void hold(struct level *level, int directory, const char *name)
{
	level->fd = (int)syscall(SYS_openat2, directory, name, &beneath, sizeof(beneath));
	check(level->fd, "openat2");
	check(fstat(level->fd, &level->facts), "fstat");
	level->reads = 0;
	level->in_batch = 1;
}

static void enter(struct level *level, int directory, const char *name, size_t length)
{
	hold(level, directory, name);
	level->length = length;
	level->size = level->at = 0;
	level->position = 0;
	if (level->chunk == NULL)
		level->chunk = malloc(DIRECTORY_CHUNK);
	if (level->chunk == NULL)
		die("malloc");
}

/* Read the next chunk of a directory. */
static void read_on(struct level *level)
{
	char number[12];

	if (!level->reads) {
		int held = level->fd;

		if (snprintf(number, sizeof(number), "%d", held) < 0)
			die("snprintf");
		level->fd = openat(proc_fd, number, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
		check(level->fd, "openat");
		close_checked(held);
		level->reads = 1;
		if (level->position != 0 && lseek(level->fd, level->position, SEEK_SET) < 0)
			die("lseek");
	}
	level->size = syscall(SYS_getdents64, level->fd, level->chunk, (size_t)DIRECTORY_CHUNK);
	check((int)level->size, "getdents64");
	level->at = 0;
}

static int walk_root(int client, uint32_t id)
{
	static __thread struct level levels[MAX_DEPTH];
	struct walk_batch *batch = calloc(1, sizeof(*batch));
	char path[MAX_PATH_BYTES + 1], name[MAX_PATH_BYTES + 1];
	size_t depth = 1;
	int alive = 1;

	if (batch == NULL)
		die("calloc");
	batch->size = sizeof(struct header) + sizeof(struct result);
	enter(&levels[0], root_fd, ".", 0);
	batch->end.directories = 1;
	while (alive && depth > 0) {
		struct level *level = &levels[depth - 1];
		const struct dirent64 *entry;
		size_t length, start;

		if (level->fd < 0) {
			memcpy(name, path, level->length);
			name[level->length] = '\0';
			hold(level, root_fd, level->length == 0 ? "." : name);
		}
		if (level->at == level->size)
			read_on(level);
		if (level->size == 0) {
			close_checked(level->fd);
			depth--;
			batch->left[batch->left_count] = *level;
			memcpy(batch->left_paths[batch->left_count], path, level->length);
			batch->left_paths[batch->left_count++][level->length] = '\0';
			level->in_batch = 0;
			if (batch->left_count == WALK_BATCH)
				alive = send_batch(client, batch, levels, depth, path, id, 0);
			continue;
		}
		entry = (const struct dirent64 *)(level->chunk + level->at);
		if (strcmp(entry->name, ".") == 0 || strcmp(entry->name, "..") == 0) {
			level->at += entry->length;
			continue;
		}
		start = level->length + (level->length > 0);
		length = start + strlen(entry->name);
		if (entry->type == 8 &&
		    (batch->count == WALK_BATCH ||
		     batch->size + sizeof(struct walk_entry) + length + sizeof(struct walk_end) >
			     MAX_REPLY)) {
			/* This entry is looked at again, in the next frame. */
			alive = send_batch(client, batch, levels, depth, path, id, 0);
			continue;
		}
		level->at += entry->length;
		level->position = entry->next;
		if (length > MAX_PATH_BYTES)
			continue;
		if (start > 0)
			path[start - 1] = '/';
		memcpy(path + start, entry->name, length - start + 1);
		if (entry->type == 4 && depth < MAX_DEPTH) {
			enter(&levels[depth], level->fd, entry->name, length);
			batch->end.directories++;
			depth++;
			continue;
		}
		if (entry->type != 8)
			continue;
		add_file(batch, level->fd, entry->name, path, length);
	}
	if (alive)
		alive = send_batch(client, batch, levels, depth, path, id, 1);
	for (size_t n = 0; n < depth && !alive; n++)
		if (levels[n].fd >= 0)
			close_checked(levels[n].fd);
	for (size_t n = 0; n < MAX_DEPTH; n++) {
		free(levels[n].chunk);
		levels[n].chunk = NULL;
	}
	free(batch);
	return alive;
}

static int serve_walk(int client, const char *frame, size_t size)
{
	struct walk walk;

	if (size < sizeof(walk))
		return 0;
	memcpy(&walk, frame, sizeof(walk));
	if (walk.header.flags != 0 || walk.options != WALK_HAS_DESCRIPTOR ||
	    size != sizeof(walk) + root_length + 1 ||
	    memcmp(frame + sizeof(walk), root_path, root_length + 1) != 0)
		return 0;
	return walk_root(client, walk.header.id);
}

/* A thread. A malformed frame ends the connection without a word. */
static void *serve(void *argument)
{
	int client = (int)(intptr_t)argument;
	char *frame = malloc(MAX_FRAME + 1);
	int greeted = 0, alive = 1;

	if (frame == NULL)
		die("malloc");
	while (alive) {
		ssize_t size = recv(client, frame, MAX_FRAME, 0);

		if (size < 0 && errno != ECONNRESET)
			die("recv");
		if (size <= 0)
			break;
		if (greeted) {
			alive = (uint8_t)frame[0] == TYPE_WALK ?
					serve_walk(client, frame, (size_t)size) :
					serve_open(client, frame, (size_t)size);
		} else {
			alive = serve_hello(client, frame, (size_t)size);
			greeted = 1;
		}
	}
	free(frame);
	close_checked(client);
	return NULL;
}

/* ---- confinement ------------------------------------------------------ */

/* Become `uid` with CAP_DAC_READ_SEARCH alone, for good. */
static void drop_privileges(uid_t uid)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2] = {
		{.effective = 1U << CAP_DAC_READ_SEARCH, .permitted = 1U << CAP_DAC_READ_SEARCH},
	};

	check(prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), "PR_SET_KEEPCAPS");
	/* EINVAL marks the end of the capabilities that this kernel knows. */
	for (unsigned long capability = 0; capability < 64; capability++)
		if (capability != CAP_DAC_READ_SEARCH &&
		    prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0) {
			if (errno != EINVAL)
				die("PR_CAPBSET_DROP");
			break;
		}
	check(setgroups(0, NULL), "setgroups");
	check(setresgid(uid, uid, uid), "setresgid");
	check(setresuid(uid, uid, uid), "setresuid");
	check((int)syscall(SYS_capset, &header, data), "capset");
	check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS");
}

/* Handle every file right of the running kernel, allow reading beneath the root. */
static void enter_landlock(void)
{
	/* Number of file rights by ABI version; a newer ABI than the table's
	 * last is handled as the last. Written as numbers, since the headers of
	 * the building machine may be older than its kernel. */
	static const int rights[] = {0, 13, 14, 15, 15, 16};
	const int newest = (int)(sizeof(rights) / sizeof(rights[0])) - 1;
	struct landlock_ruleset_attr ruleset = {0};
	struct landlock_path_beneath_attr beneath = {
		.allowed_access = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR,
		.parent_fd = root_fd,
	};
	int abi, fd;

	abi = (int)syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
	check(abi, "landlock_create_ruleset (is Landlock enabled?)");
	ruleset.handled_access_fs = (1ULL << rights[abi < newest ? abi : newest]) - 1;
	fd = (int)syscall(SYS_landlock_create_ruleset, &ruleset,
			  sizeof(ruleset.handled_access_fs), 0);
	check(fd, "landlock_create_ruleset");
	check((int)syscall(SYS_landlock_add_rule, fd, LANDLOCK_RULE_PATH_BENEATH, &beneath, 0),
	      "landlock_add_rule");
	check((int)syscall(SYS_landlock_restrict_self, fd, 0), "landlock_restrict_self");
	close_checked(fd);
}

/* A plain allow-list by number; anything else ends the process. */
static void enter_seccomp(void)
{
	static const uint32_t allowed[] = {
		/* the work */
		__NR_openat2, __NR_openat, __NR_newfstatat, __NR_fstat, __NR_fcntl, __NR_close,
		__NR_getdents64, __NR_lseek,
		__NR_recvfrom, __NR_sendmsg, __NR_accept4, __NR_setsockopt,
		/* threads and memory: what the C library calls for them */
		__NR_clone, __NR_clone3, __NR_set_robust_list, __NR_rseq, __NR_rt_sigaction,
		__NR_rt_sigprocmask, __NR_futex, __NR_sched_yield, __NR_sched_getaffinity,
		__NR_getrandom, __NR_mmap, __NR_munmap, __NR_mprotect, __NR_madvise, __NR_brk,
		/* the end, and saying why */
		__NR_write, __NR_exit, __NR_exit_group,
	};
	enum { COUNT = sizeof(allowed) / sizeof(allowed[0]), PROLOGUE = 4 };
	struct sock_filter code[PROLOGUE + COUNT + 2];
	struct sock_fprog program = {.len = PROLOGUE + COUNT + 2, .filter = code};
	const uint8_t to_allow = COUNT;

	code[0] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
					       offsetof(struct seccomp_data, arch));
	code[1] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, THIS_ARCH, 1, 0);
	code[2] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	code[3] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
					       offsetof(struct seccomp_data, nr));
	/* Instruction n jumps over the comparisons that are left and the KILL. */
	for (uint8_t n = 0; n < COUNT; n++)
		code[PROLOGUE + n] = (struct sock_filter)BPF_JUMP(
			BPF_JMP | BPF_JEQ | BPF_K, allowed[n], (uint8_t)(to_allow - n), 0);
	code[PROLOGUE + COUNT] =
		(struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	code[PROLOGUE + COUNT + 1] =
		(struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	check((int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program), "seccomp");
}

/* ---- start ------------------------------------------------------------ */

static int listen_at(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd;

	if (strlen(path) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		die(path);
	}
	memcpy(address.sun_path, path, strlen(path) + 1);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	check(fd, "socket");
	check(bind(fd, (struct sockaddr *)&address, sizeof(address)), path);
	check(chmod(path, 0666), "chmod");
	check(listen(fd, BACKLOG), "listen");
	return fd;
}

/* Descriptors under way are counted against RLIMIT_NOFILE of the sender's uid. */
static void raise_descriptor_limit(void)
{
	struct rlimit limit;

	check(getrlimit(RLIMIT_NOFILE, &limit), "getrlimit");
	limit.rlim_cur = limit.rlim_max;
	check(setrlimit(RLIMIT_NOFILE, &limit), "setrlimit");
}

int main(int argc, char **argv)
{
	const int send_buffer = SEND_BUFFER;
	pthread_attr_t attributes;
	unsigned long uid;
	char *rest;
	int listener;

	if (argc != 4) {
		fprintf(stderr, "usage: floor_broker SOCKET ROOT UID\n");
		return 2;
	}
	errno = 0;
	uid = strtoul(argv[3], &rest, 10);
	if (errno != 0 || *argv[3] == '\0' || *rest != '\0' || uid == 0 || uid >= UINT32_MAX) {
		fprintf(stderr, "floor_broker: UID must be a number, and not 0\n");
		return 2;
	}
	root_path = argv[2];
	root_length = strlen(root_path);

	raise_descriptor_limit();
	listener = listen_at(argv[1]);
	root_fd = open(root_path, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	check(root_fd, root_path);
	proc_fd = open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC);
	check(proc_fd, "/proc/self/fd");
	if (pthread_attr_init(&attributes) != 0 ||
	    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED) != 0 ||
	    pthread_attr_setstacksize(&attributes, THREAD_STACK) != 0)
		die("pthread_attr");
	if (puts("ready") < 0 || fflush(stdout) != 0)
		die("standard output");

	drop_privileges((uid_t)uid);
	enter_landlock();
	enter_seccomp();

	for (;;) {
		pthread_t thread;
		int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

		check(client, "accept4");
		check(setsockopt(client, SOL_SOCKET, SO_SNDBUF, &send_buffer, sizeof(send_buffer)),
		      "SO_SNDBUF");
		/* pthread functions return the error number. */
		errno = pthread_create(&thread, &attributes, serve, (void *)(intptr_t)client);
		if (errno != 0)
			die("pthread_create");
	}
}
