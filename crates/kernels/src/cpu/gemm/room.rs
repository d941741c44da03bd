//! Memory that a thread keeps from one task to the next.

use std::cell::RefCell;

thread_local! {
    /// Room for the operands that a task makes ready.
    static ROOM: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Runs `f` with `len` floats of unspecified values.
pub(super) fn with_room<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    ROOM.with(|room| {
        let mut room = room.take();
        if room.len() < len {
            room.resize(len, 0.0);
        }
        let result = f(&mut room[..len]);
        ROOM.set(room);
        result
    })
}
