//! Ctrl-A at a terminal: X leaves, a second Ctrl-A is one for the guest.

use std::collections::VecDeque;

const CTRL_A: u8 = 1;

pub(super) struct Keys {
    /// Only at a terminal: what is piped in goes through as it is.
    active: bool,
    escaped: bool,
}

impl Keys {
    pub const fn new(active: bool) -> Self {
        Self { active, escaped: false }
    }

    /// Appends to `guest` what is for it; true when the person wants out.
    pub fn pass(&mut self, typed: &[u8], guest: &mut VecDeque<u8>) -> bool {
        if !self.active {
            guest.extend(typed);
            return false;
        }
        for key in typed {
            match (std::mem::take(&mut self.escaped), *key) {
                (false, CTRL_A) => self.escaped = true,
                (true, b'x' | b'X') => return true,
                (true, CTRL_A) => guest.push_back(CTRL_A),
                // Not a command: the guest gets both.
                (true, other) => guest.extend([CTRL_A, other]),
                (false, other) => guest.push_back(other),
            }
        }
        false
    }
}
