/* A slower disk: each fsync and fdatasync takes EXTRA_NS longer. slow_disk.py builds it, and has PostgreSQL load it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <time.h>

static int slowly(const char *name, int fd)
{
    int (*real)(int) = (int (*)(int)) dlsym(RTLD_NEXT, name);
    int result = real(fd), error = errno;
    struct timespec left = {0, EXTRA_NS};
    while (nanosleep(&left, &left) == -1 && errno == EINTR)
        ;  /* backends are signalled a lot */
    errno = error;
    return result;
}

int fsync(int fd) { return slowly("fsync", fd); }
int fdatasync(int fd) { return slowly("fdatasync", fd); }
