//! A terminal in raw mode: keys go to the guest as they are typed.

use std::io;

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// Standard input in raw mode; as it was before when dropped.
pub(super) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// None where standard input is no terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = rustix::stdio::stdin();
        if !isatty(stdin) {
            return Ok(None);
        }
        let before = tcgetattr(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.before);
    }
}
