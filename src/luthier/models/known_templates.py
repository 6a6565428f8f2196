"""SHA-256 of chat templates that imported models may use without approval."""

KNOWN_TEMPLATES = frozenset(
    {
        "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",  # SmolLM2
        # In the style of these families, as the tests have them:
        "f950548988e50713a9975a11be0eaf1d29c4fe4be0ba22a57daeebbc27a7adb9",  # ChatML
        "f447d5c477873264321523ccaf951699c1297c7f08f4c3e623213d9084687413",  # Mistral
        "0d27966024b1411a2b302c253677111f9443518506aabf3135f3be6d999bc364",  # Llama 2
        "c7e5f342fcbc7d669d06155c3b1deb31bd8b3aac2fbc38cb18ea9f3d7fda03db",  # Zephyr
        "908ad886173b48980eb37c8d1273da5f73f6b786456e0e15129907bd01fba486",  # Vicuna
        "c5640f2e37c01a06c8fea56fd2261a54acd0ea8755d90d8815d654225f634be2",  # Phi 3
        "b0365152aea534fe9531c40dc7523acb3c2f295ba083d2395351ee43430b6f32",  # Gemma
        "82769df1005b29b4c45002c13cb12ff579614befb9dfe05a03f5f184f91858d7",  # GLM 4.5
        "7f7cfeda9f776bfa92c8dc28b236eade99a4164b7a0a8ab398bcb9dd13e2f7e6",  # Qwen 3
        "b18c497a55ed4b4b94aa38836898bf47e6adac093c9f0c96de6a7015293f77ee",  # QwQ
    }
)
