//! What the networks of a block add to the residual stream together, forward and back.

use slim_formats::{
    Part,
    arch::{Norms, Stage},
};

use super::{
    Visitor,
    block::{Branch, Walk},
    network::{Mixture, Neurons},
};
use crate::Result;

/// The networks of a block on their way, for `m` tokens.
pub struct Networks {
    /// `[m, hidden]`: input of the network of all tokens, and of experts without norms of their
    /// own.
    input: Vec<f32>,
    /// The inputs of the router and of the experts, if these have norms of their own.
    to_experts: Option<[Vec<f32>; 2]>,
    network: Option<Neurons>,
    mixture: Option<Mixture>,
}

/// What norms need on the way back where experts and a network beside them are joined.
struct Joint {
    beside: Branch,
    /// The sum of experts, `[m, hidden]`.
    experts: Vec<f32>,
    /// That of both, each behind its norm.
    sum: Vec<f32>,
}

impl Walk<'_> {
    /// The networks for the residual stream `x: [m, hidden]`.
    pub fn networks(&self, x: &[f32]) -> Result<Networks> {
        let input = self.normed(Part::FfnNorm, x);
        let to_experts = self
            .block
            .spec
            .has_expert_norms()
            .then(|| [Part::RouterNorm, Part::ExpertsNorm].map(|norm| self.normed(norm, x)));
        let network = self.network(&input)?;
        let mixture = match &to_experts {
            Some([to_router, to_experts]) => self.mixture(to_router, to_experts)?,
            None => self.mixture(&input, &input)?,
        };
        Ok(Networks { input, to_experts, network, mixture })
    }

    /// Adds what the networks give to the residual stream `x`.
    pub fn add_networks(&self, of: &Networks, x: &mut Vec<f32>) -> Result<()> {
        if of.to_experts.is_some() {
            let Joint { sum, .. } = self.joint(of, x.len())?;
            let scale = self.block.spec.residual_scale;
            let normed = self.normed(Part::FfnPostNorm, &sum);
            x.iter_mut().zip(normed).for_each(|(x, added)| *x += scale * added);
            return Ok(());
        }
        if let Some(neurons) = &of.network {
            self.add_branch(Stage::FfnOutput, neurons.output(), x)?;
        }
        match &of.mixture {
            Some(mixture) => self.add_mixture(mixture, x),
            None => Ok(()),
        }
    }

    fn joint(&self, of: &Networks, len: usize) -> Result<Joint> {
        let (mut sum, mut experts) = (vec![0.0; len], vec![0.0; len]);
        let beside = match &of.network {
            Some(neurons) => self.add_branch(Stage::FfnOutput, neurons.output(), &mut sum)?,
            None => Branch::default(),
        };
        if let Some(mixture) = &of.mixture {
            self.add_mixture(mixture, &mut experts)?;
        }
        let normed = self.normed(Part::ExpertsPostNorm, &experts);
        sum.iter_mut().zip(normed).for_each(|(sum, added)| *sum += added);
        Ok(Joint { beside, experts, sum })
    }

    /// Turns the gradient `dx` behind the networks into that at the residual stream `x` before
    /// them; both `[m, hidden]`.
    pub fn reverse_networks(
        &self,
        of: Networks,
        x: &[f32],
        dx: &mut [f32],
        visit: &mut Visitor<'_>,
    ) -> Result<()> {
        match of.to_experts {
            Some(_) => self.reverse_joint(of, x, dx, visit),
            None => self.reverse_apart(of, x, dx, visit),
        }
    }

    fn reverse_apart(
        &self,
        of: Networks,
        x: &[f32],
        dx: &mut [f32],
        visit: &mut Visitor<'_>,
    ) -> Result<()> {
        let Networks { input, network, mixture, .. } = of;
        let branch = match (self.block.spec.norms, &network) {
            (Norms::Before, _) | (_, None) => Branch::default(),
            (_, Some(neurons)) => {
                self.add_branch(Stage::FfnOutput, neurons.output(), &mut x.to_vec())?
            }
        };
        let d_output = self.reverse_branch(Stage::FfnOutput, branch, dx, visit)?;
        let mut d_input = vec![0.0; input.len()];
        if let Some(neurons) = network {
            self.reverse_network(neurons, &input, &d_output, &mut d_input, visit)?;
        }
        if let Some(mixture) = mixture {
            let d_scores = self.reverse_mixture(mixture, &d_output, &mut d_input, visit)?;
            self.add_product(&mut d_input, &d_scores, Part::Router)?;
        }
        drop(d_output);
        self.reverse_norm(Part::FfnNorm, x, &d_input, dx, visit)
    }

    fn reverse_joint(
        &self,
        of: Networks,
        x: &[f32],
        dx: &mut [f32],
        visit: &mut Visitor<'_>,
    ) -> Result<()> {
        let zeros = || vec![0.0; dx.len()];
        let Joint { beside, experts, sum } = self.joint(&of, dx.len())?;
        let [mut d_sum, mut d_experts] = [zeros(), zeros()];
        let [mut d_input, mut d_to_router, mut d_to_experts] = [zeros(), zeros(), zeros()];
        let scale = self.block.spec.residual_scale;
        let d_normed: Vec<f32> = dx.iter().map(|dx| scale * dx).collect();
        self.reverse_norm(Part::FfnPostNorm, &sum, &d_normed, &mut d_sum, visit)?;
        self.reverse_norm(Part::ExpertsPostNorm, &experts, &d_sum, &mut d_experts, visit)?;
        if let Some(mixture) = of.mixture {
            let d_scores = self.reverse_mixture(mixture, &d_experts, &mut d_to_experts, visit)?;
            self.add_product(&mut d_to_router, &d_scores, Part::Router)?;
        }
        let d_beside = self.reverse_branch(Stage::FfnOutput, beside, &mut d_sum, visit)?;
        if let Some(neurons) = of.network {
            self.reverse_network(neurons, &of.input, &d_beside, &mut d_input, visit)?;
        }
        for (norm, d_normed) in [
            (Part::FfnNorm, &d_input),
            (Part::RouterNorm, &d_to_router),
            (Part::ExpertsNorm, &d_to_experts),
        ] {
            self.reverse_norm(norm, x, d_normed, dx, visit)?;
        }
        Ok(())
    }
}
