//! One VM on this node: its directory, its process, how it is started and how it ended.

pub mod api;
pub mod capture;
pub mod cgroup;
pub mod config;
pub mod dir;
pub mod end;
pub mod guest_agent;
pub mod outcome;
pub mod process;
pub mod start;
pub mod user;
