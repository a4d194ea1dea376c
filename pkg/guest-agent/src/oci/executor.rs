// SPDX-License-Identifier: Apache-2.0
//! How a container's init process becomes the container's program.

use std::collections::HashMap;
use std::path::PathBuf;

use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use oci_spec::runtime::Spec;

use super::lookup;
use crate::helper::{Line, Report};

/// Looks the program up when the container is created and executes it when it
/// is started. What fails is told in runc's words over the helper's pipe, since
/// libcontainer's own way would wrap them.
#[derive(Debug, Clone)]
pub struct ReportingExecutor {
    report: Report,
    /// libcontainer adds HOME to the environment and tells it only here.
    home: std::rc::Rc<std::cell::RefCell<Option<String>>>,
}

impl ReportingExecutor {
    /// An executor that tells failures to `report`.
    #[must_use]
    pub fn new(report: Report) -> Self {
        Self {
            report,
            home: std::rc::Rc::default(),
        }
    }

    fn find(&self, spec: &Spec) -> Result<(PathBuf, Vec<String>, Vec<String>), String> {
        let process = spec.process().as_ref().ok_or("the spec has no process")?;
        let args = process.args().clone().unwrap_or_default();
        let name = args.first().ok_or("args must not be empty")?;
        let mut env = process.env().clone().unwrap_or_default();
        if let Some(home) = self.home.borrow().as_ref()
            && !env.iter().any(|entry| entry.starts_with("HOME="))
        {
            env.push(format!("HOME={home}"));
        }
        let program = lookup::program(name, &env)?;
        Ok((program, args, env))
    }
}

impl Executor for ReportingExecutor {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        self.find(spec).map(drop).map_err(|words| {
            self.report.send(&Line::Error(words.clone()));
            ExecutorValidationError::ArgValidationError(words)
        })
    }

    fn setup_envs(&self, envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // The process's own environment does not matter: execve gets another.
        *self.home.borrow_mut() = envs.get("HOME").cloned();
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let words = match self.find(spec) {
            Ok((program, args, env)) => lookup::execute(&program, &args, &env),
            Err(words) => words,
        };
        self.report.send(&Line::Error(words.clone()));
        Err(ExecutorError::Other(words))
    }
}
