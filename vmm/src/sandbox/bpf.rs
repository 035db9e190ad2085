//! Lists of system calls as programs for seccomp.
//!
//! A program is a binary search over the numbers. One comparison after the other, as libraries make them, costs a start of a VM
//! several milliseconds: for each number that there is, the kernel tries beforehand whether the program always allows it.
//! What it always allows is not asked again; the few calls of which an argument counts are, each time, and are compared first.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::sock_filter;

/// What a call is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Answer(u32);

impl Answer {
    pub(super) const ALLOW: Self = Self(libc::SECCOMP_RET_ALLOW);
    pub(super) const LOG: Self = Self(libc::SECCOMP_RET_LOG);
    pub(super) const TRAP: Self = Self(libc::SECCOMP_RET_TRAP);

    /// The call fails.
    pub(super) const fn errno(errno: u16) -> Self {
        Self(libc::SECCOMP_RET_ERRNO | errno as u32)
    }
}

/// What is said of one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Rule {
    /// Always the same.
    Always(Answer),
    /// Allowed where the low 32 bits of the argument with this number are one of these.
    Only(u8, Vec<u32>),
}

/// What is said of the calls that are listed.
pub(super) type Rules = BTreeMap<c_long, Rule>;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;
/// `AUDIT_ARCH_X86_64`.
const X86_64: u32 = 0xc000_003e;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_NOT_LESS: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Where a jump goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    /// The next instruction.
    Next,
    /// This instruction.
    At(usize),
    /// The end with this answer.
    End(u32),
    /// The comparisons of this call's argument.
    Rule(c_long),
}

/// A comparison, and where it leads.
struct Jump {
    at: usize,
    yes: Place,
    no: Place,
}

struct Program {
    code: Vec<sock_filter>,
    jumps: Vec<Jump>,
}

/// The program for `rules`; what is not in them is answered with `otherwise`. Calls by another architecture's numbers end the
/// process.
pub(super) fn program(rules: &Rules, otherwise: Answer) -> io::Result<Vec<sock_filter>> {
    let mut program = Program { code: Vec::new(), jumps: Vec::new() };
    program.add(LOAD, ARCH);
    program.branch(IF_EQUAL, X86_64, Place::Next, Place::End(libc::SECCOMP_RET_KILL_PROCESS));
    program.add(LOAD, NUMBER);
    for (call, rule) in rules {
        if matches!(rule, Rule::Only(..)) {
            program.branch(IF_EQUAL, number(*call)?, Place::Rule(*call), Place::Next);
        }
    }
    let spans = spans(rules, otherwise)?;
    program.search(&spans);
    // What calls with rules lead to, then the ends; all jumps go forward.
    for (call, rule) in rules {
        if let Rule::Only(argument, values) = rule {
            program.land(Place::Rule(*call));
            // Nothing is allowed.
            if values.is_empty() {
                program.add(RETURN, otherwise.0);
                continue;
            }
            program.add(LOAD, ARGUMENTS + 8 * u32::from(*argument));
            for (number, value) in values.iter().enumerate() {
                let last = number + 1 == values.len();
                let no = if last { Place::End(otherwise.0) } else { Place::Next };
                program.branch(IF_EQUAL, *value, Place::End(Answer::ALLOW.0), no);
            }
        }
    }
    let mut ends: Vec<u32> = program.jumps.iter().flat_map(|jump| [jump.yes, jump.no]).filter_map(end).collect();
    ends.sort_unstable();
    ends.dedup();
    for answer in ends {
        program.land(Place::End(answer));
        program.add(RETURN, answer);
    }
    program.link()
}

const fn end(place: Place) -> Option<u32> {
    match place {
        Place::End(answer) => Some(answer),
        _ => None,
    }
}

fn number(call: c_long) -> io::Result<u32> {
    u32::try_from(call).map_err(io::Error::other)
}

/// Where numbers of calls begin that are always answered the same and lead to the same place, in order, from 0 on.
fn spans(rules: &Rules, otherwise: Answer) -> io::Result<Vec<(u32, Place)>> {
    let mut spans = vec![(0, Place::End(otherwise.0))];
    let mut add = |from, place| match spans.last_mut() {
        Some((begin, last)) if *begin == from => *last = place,
        Some((_, last)) if *last == place => {}
        _ => spans.push((from, place)),
    };
    for (call, rule) in rules {
        // The others were compared before.
        if let Rule::Always(answer) = rule {
            let number = number(*call)?;
            add(number, Place::End(answer.0));
            add(number + 1, Place::End(otherwise.0));
        }
    }
    // One that begins where the last one ended may have become the same as the one before.
    spans.dedup_by(|later, earlier| later.1 == earlier.1);
    Ok(spans)
}

impl Program {
    fn add(&mut self, code: u16, k: u32) {
        self.code.push(sock_filter { code, jt: 0, jf: 0, k });
    }

    fn branch(&mut self, code: u16, k: u32, yes: Place, no: Place) {
        self.jumps.push(Jump { at: self.code.len(), yes, no });
        self.add(code, k);
    }

    /// Finds the span of the number in hand.
    fn search(&mut self, spans: &[(u32, Place)]) {
        let (low, high) = spans.split_at(spans.len() / 2);
        let Some((begin, _)) = high.first() else { return };
        let leaf = |spans: &[(u32, Place)]| if let [(_, place)] = spans { Some(*place) } else { None };
        if low.is_empty() {
            // One span for all numbers: a comparison that always holds.
            let place = high[0].1;
            return self.branch(IF_NOT_LESS, *begin, place, place);
        }
        let jump = self.jumps.len();
        self.branch(IF_NOT_LESS, *begin, Place::Next, Place::Next);
        match leaf(low) {
            Some(place) => self.jumps[jump].no = place,
            None => self.search(low),
        }
        self.jumps[jump].yes = match leaf(high) {
            Some(place) => place,
            None => {
                let at = self.code.len();
                self.search(high);
                Place::At(at)
            }
        };
    }

    /// `place` is here.
    fn land(&mut self, place: Place) {
        let here = Place::At(self.code.len());
        for jump in &mut self.jumps {
            for target in [&mut jump.yes, &mut jump.no] {
                if *target == place {
                    *target = here;
                }
            }
        }
    }

    /// Writes down how far jumps go.
    fn link(mut self) -> io::Result<Vec<sock_filter>> {
        let far = || io::Error::other("a list of system calls is too long for one program");
        for jump in &self.jumps {
            let distance = |place: Place| match place {
                Place::Next => Ok(0),
                Place::At(at) => u8::try_from(at - jump.at - 1).map_err(|_| far()),
                // All have landed.
                Place::End(_) | Place::Rule(_) => Err(far()),
            };
            let instruction = &mut self.code[jump.at];
            (instruction.jt, instruction.jf) = (distance(jump.yes)?, distance(jump.no)?);
        }
        Ok(self.code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would make of a call.
    fn answer(program: &[sock_filter], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let load = |offset: u32| match offset {
            NUMBER => number,
            ARCH => arch,
            offset => (arguments[((offset - ARGUMENTS) / 8) as usize] >> (8 * (offset % 8))) as u32,
        };
        let (mut at, mut value) = (0, 0);
        for _ in 0..program.len() {
            let instruction = &program[at];
            at += 1;
            let holds = match instruction.code {
                LOAD => {
                    value = load(instruction.k);
                    continue;
                }
                RETURN => return instruction.k,
                IF_EQUAL => value == instruction.k,
                IF_NOT_LESS => value >= instruction.k,
                other => panic!("{other:#x} is in a program"),
            };
            at += usize::from(if holds { instruction.jt } else { instruction.jf });
        }
        panic!("a program does not end");
    }

    fn check(rules: &Rules, otherwise: Answer) -> usize {
        let program = program(rules, otherwise).unwrap();
        for number in (0..600).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
            for low in [0, 1, 5, 6, 7, 0xae80, u32::MAX] {
                let argument = u64::from(low) | 7 << 32;
                let expected = match rules.get(&c_long::from(number)) {
                    None => otherwise,
                    Some(Rule::Always(answer)) => *answer,
                    Some(Rule::Only(_, values)) if values.contains(&low) => Answer::ALLOW,
                    Some(Rule::Only(..)) => otherwise,
                };
                let said = answer(&program, X86_64, number, [argument; 6]);
                assert_eq!(said, expected.0, "call {number}, argument {low:#x}, {rules:?}");
            }
        }
        assert_eq!(answer(&program, 0x4000_0003, 0, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS);
        program.len()
    }

    #[test]
    fn a_program_says_of_every_call_what_the_rules_say() {
        let always = |answer| move |call: &c_long| (*call, Rule::Always(answer));
        let allow = always(Answer::ALLOW);
        let sets: [&[c_long]; 7] = [&[], &[0], &[1], &[5, 6, 7], &[0, 2, 4, 6, 8, 9, 10, 300], &[599], &[16, 17]];
        for calls in sets {
            let mut rules: Rules = calls.iter().map(allow).collect();
            check(&rules, Answer::TRAP);
            check(&rules, Answer::LOG);
            rules.insert(3, Rule::Always(Answer::errno(1)));
            rules.insert(16, Rule::Only(1, vec![0xae80, 5]));
            rules.insert(17, Rule::Only(0, vec![1]));
            rules.insert(40, Rule::Only(0, Vec::new()));
            check(&rules, Answer::TRAP);
            rules.extend((18..24).map(|call| (call, Rule::Always(Answer::TRAP))));
            check(&rules, Answer::TRAP);
        }
        // As many different spans as a list of ours may have.
        let comb: Rules = (0..180).step_by(2).map(|call| allow(&call)).collect();
        assert!(check(&comb, Answer::TRAP) < 200);
        let long: Rules = (0..1000).step_by(2).map(|call| allow(&call)).collect();
        assert!(program(&long, Answer::TRAP).unwrap_err().to_string().contains("too long"));
    }
}
