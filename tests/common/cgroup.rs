//! Running a command inside a memory limit that the kernel enforces: a control group, of version 1 or 2.
#![allow(dead_code)] // each test uses its part

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A control group with a memory limit; removed when dropped.
pub struct MemoryGroup {
    folder: PathBuf,
    v2: bool,
}

impl MemoryGroup {
    /// A new group that may hold so many bytes, page cache included. An error where this process may not make one: not root,
    /// or no control groups.
    pub fn new(name: &str, bytes: u64) -> io::Result<Self> {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let v2 = !v1.join("memory.limit_in_bytes").exists();
        let root = if v2 { Path::new("/sys/fs/cgroup") } else { v1 };
        if v2 {
            std::fs::write(root.join("cgroup.subtree_control"), "+memory")?;
        }
        let folder = root.join(format!("oncall-{name}-{}", std::process::id()));
        std::fs::create_dir(&folder)?;
        let group = MemoryGroup { folder, v2 };
        group.set(if v2 { "memory.max" } else { "memory.limit_in_bytes" }, &bytes.to_string())?;
        Ok(group)
    }

    fn set(&self, file: &str, value: &str) -> io::Result<()> {
        std::fs::write(self.folder.join(file), value)
    }

    /// Runs a command inside, to its end.
    pub fn run(&self, command: &Command) -> io::Result<Output> {
        let procs = self.folder.join("cgroup.procs");
        // A process that moves itself before it becomes the command takes all of the command's memory with it.
        let mut inside = Command::new("sh");
        inside.arg("-c").arg("echo $$ > \"$0\" && exec \"$@\"").arg(procs).arg(command.get_program());
        inside.args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(v) => inside.env(key, v),
                None => inside.env_remove(key),
            };
        }
        inside.output()
    }

    /// The most bytes that it has held so far.
    pub fn peak(&self) -> Option<u64> {
        let file = if self.v2 { "memory.peak" } else { "memory.max_usage_in_bytes" };
        std::fs::read_to_string(self.folder.join(file)).ok()?.trim().parse().ok()
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.folder);
    }
}
