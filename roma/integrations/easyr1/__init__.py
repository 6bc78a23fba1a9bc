"""ROMA inside EasyR1: an actor, a worker and a trainer of its own classes, and a launcher.

    python -m roma.integrations.easyr1 config=CONFIG.yaml … roma.num_views=2 roma.lambda_inv=1

    actor    `ViewTerms`: the views and their two terms, inside the update of a policy
    worker   puts that actor where EasyR1 builds its own
    driver   tells the workers which rollouts are right
    launch   the command

EasyR1's package is called verl too, but is not verl: docs/EASYR1.md.
"""
