/* Memory that a thread keeps from call to call, until it asks for more or ends. */

#ifndef OPENMYTHOS_ROOMS
#define OPENMYTHOS_ROOMS

#if defined(__AVX512F__)

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

enum { OF_DIGITS, OF_ROWS, OF_WEIGHTS, ROOMS, ROOM_LINE = 64 };

typedef struct {
    char *at;
    int64_t bytes;
} Room;

static pthread_key_t of_thread;
static int rooms_stand;  /* whether the system tells of threads that end */

static void leave_rooms(void *rooms) {
    for (int number = 0; number < ROOMS; number++) free(((Room *)rooms)[number].at);
    free(rooms);
}

__attribute__((constructor)) static void open_rooms(void) {
    rooms_stand = pthread_key_create(&of_thread, leave_rooms) == 0;
}

/* One of this thread's rooms, of so many bytes or more. Null: there is none. */
static inline char *own_room(int number, int64_t bytes) {
    Room *rooms = rooms_stand ? pthread_getspecific(of_thread) : 0;
    if (rooms_stand && !rooms) {
        rooms = calloc(ROOMS, sizeof(Room));
        if (rooms && pthread_setspecific(of_thread, rooms)) free(rooms), rooms = 0;
    }
    if (!rooms) return 0;
    Room *room = rooms + number;
    if (room->bytes < bytes) {
        free(room->at);
        room->bytes = (bytes + ROOM_LINE - 1) / ROOM_LINE * ROOM_LINE;
        room->at = aligned_alloc(ROOM_LINE, room->bytes);
        if (!room->at) room->bytes = 0;
    }
    return room->at;
}

#endif
#endif
