//! Disks that a test makes: small ones that fill up, and failing ones.
#![allow(dead_code)] // each test uses its part

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a command; its stderr is the error.
pub fn sh(command: &str, args: &[&str]) -> io::Result<String> {
    let o = Command::new(command).args(args).output()?;
    if !o.status.success() {
        return Err(io::Error::other(format!("{command}: {}", String::from_utf8_lossy(&o.stderr).trim())));
    }
    Ok(String::from_utf8_lossy(&o.stdout).trim().to_string())
}

/// A mounted file system; unmounted when dropped.
pub struct Mount {
    folder: tempfile::TempDir,
}

impl Mount {
    /// Mounts with these arguments of `mount`. An error where this process may not: not root, or in a container.
    pub fn new(args: &[&str]) -> io::Result<Self> {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let at = folder.path().to_str().expect("a UTF-8 path");
        sh("mount", &[args, &[at]].concat())?;
        Ok(Mount { folder })
    }

    /// A file system in memory that holds so many bytes.
    pub fn tmpfs(bytes: u64) -> io::Result<Self> {
        Self::new(&["-t", "tmpfs", "-o", &format!("size={bytes}"), "oncall-test"])
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A file on it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// The names of the files on it, in order.
    pub fn names(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.path()).expect("a folder");
        let mut names: Vec<String> =
            names.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Fills it, but for so many bytes, with a file called `filler`.
    pub fn fill_but(&self, free: u64) {
        let disk = rustix::fs::statvfs(self.path()).expect("a file system");
        let n = (disk.f_bavail * disk.f_frsize).saturating_sub(free);
        std::fs::write(self.file("filler"), vec![0; n as usize]).expect("as much as is free");
    }

    /// Makes room again.
    pub fn make_room(&self) {
        std::fs::remove_file(self.file("filler")).expect("it was filled");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: whoever still has a file open keeps it, and the folder can go.
        let _ = sh("umount", &["-l", self.path().to_str().unwrap_or_default()]);
    }
}
