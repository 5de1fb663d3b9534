"""What a run will cost, from its recipe alone: no weight is downloaded, no tensor has storage.

    teachers    sizes of networks, autoencoders and text encoders that are known without their files
    cluster     GPUs and what they can do
    ledger      counts bytes and operations of whatever runs under it
    hollow      tensors that have shapes and no numbers
    calls       which network calls a training step makes
    rehearsal   a training step of the real objectives over networks without storage
    stages      what each command trains and holds, and the cost of its steps
    sampling    what sampling and synthesis hold and cost
    disk        what data sets and checkpoints take
    fit         settings that make a stage fit
    report      all of it for one recipe, as values; ``show`` lays them out for people

The decision worth knowing: costs are not formulas. The objectives of ``train/`` run as they are, on small
latents, and each velocity they ask for is computed by the real network on tensors that have shapes
only. So the plan follows the program when the program changes.
"""
