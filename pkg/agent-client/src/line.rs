// SPDX-License-Identifier: Apache-2.0
//! What clients of a channel hold instead of the channel.
//!
//! hyper's connection lives as long as anybody holds a `Channel`. Clients are
//! cloned and kept by whoever wants to; so they hold a [`Line`], which is cut
//! for all of them at once, and a `Channel` only while it takes a call.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, StdError, http};
use tonic::transport::Channel;
use tower::ServiceExt;

use crate::error::AgentError;

/// A way to the agent that ends with its [`AgentChannel`](crate::AgentChannel),
/// however many hold it.
#[derive(Debug, Clone)]
pub struct Line(Arc<Mutex<Option<Channel>>>);

impl Line {
    pub(crate) fn new(channel: Channel) -> Self {
        Self(Arc::new(Mutex::new(Some(channel))))
    }

    fn channel(&self) -> MutexGuard<'_, Option<Channel>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses calls from now on; those under way go on.
    pub(crate) fn cut(&self) {
        self.channel().take();
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.channel().is_none()
    }
}

impl Service<http::Request<Body>> for Line {
    type Response = http::Response<Body>;
    type Error = StdError;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // The channel's readiness belongs to the clone that takes the call.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let channel = self.channel().clone();
        Box::pin(async move {
            let channel = channel.ok_or(AgentError::Closing)?;
            Ok(channel.oneshot(request).await?)
        })
    }
}
